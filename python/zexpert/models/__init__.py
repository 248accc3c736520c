# SPDX-License-Identifier: Apache-2.0
"""Blocks of published models, built on FusedMoE, with their checkpoints' names."""

from zexpert.models.longcat_flash import LongcatFlashConfig, LongcatFlashMoE
from zexpert.models.moe_plus_plus import MoEPlusPlusBlock, MoEPlusPlusConfig
from zexpert.models.zeda import ZedaGlm4Config, ZedaGlm4MoE, ZedaQwen3Config, ZedaQwen3MoE

__all__ = [
    "LongcatFlashConfig",
    "LongcatFlashMoE",
    "MoEPlusPlusBlock",
    "MoEPlusPlusConfig",
    "ZedaGlm4Config",
    "ZedaGlm4MoE",
    "ZedaQwen3Config",
    "ZedaQwen3MoE",
]
