# SPDX-License-Identifier: Apache-2.0
"""Tools for training with zero experts: controllers of the selection bias, and auxiliary losses."""

from zexpert.training.bias_controllers import BiasController, LongCatBiasController, SignBiasController
from zexpert.training.losses import group_loss, switch_loss

__all__ = ["BiasController", "LongCatBiasController", "SignBiasController", "group_loss", "switch_loss"]
