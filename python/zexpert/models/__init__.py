# SPDX-License-Identifier: Apache-2.0
"""MoE blocks of published models, built on FusedMoE. They load the models' checkpoints."""

from zexpert.models.checkpoint import checkpoint_state_dict
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
    "checkpoint_state_dict",
]
