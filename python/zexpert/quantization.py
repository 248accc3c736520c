# SPDX-License-Identifier: Apache-2.0
"""Quantisation of layers and models in place."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from zexpert.layer import FusedMoE
from zexpert.layer_quantization import check_quantization
from zexpert.runner.placement import EXPERT_WEIGHTS

Module = TypeVar("Module", bound=nn.Module)


def quantize(module: Module, quantization: str = "fp8_block") -> Module:
    """Quantises the experts of every FusedMoE in `module`, in place, and returns it.

    "fp8_block": w13_weight and w2_weight become float8_e4m3fn, with the float32 parameters w13_weight_scale_inv and
    w2_weight_scale_inv: a scale for each block of 128 x 128; see zexpert.ops.quantize_blockwise. The weights are no
    longer trained: requires_grad is False, and an optimizer made before must not be used again. All else stays.
    The memory of one layer is needed twice.

    Args:
        module: a FusedMoE, or a model that contains some.
        quantization: the format.

    Raises:
        ValueError: for another format; if there is no FusedMoE, or one is quantised already, has weights with NaN or
            infinity, weights that are DTensors, or parts of tensor_parallel_group's ranks that cut a block of 128.
            Nothing is changed then.
    """
    check_quantization(quantization)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, FusedMoE)}
    if not layers:
        raise ValueError(f"module must be a FusedMoE or contain one, got {type(module).__name__} without one")
    for name, layer in layers.items():
        shown = name or "module"
        if layer.quantization is not None:
            raise ValueError(f'{shown} must not be quantised already, got quantization="{layer.quantization}"')
        layer.placement.check_blocks()
        for weight_name in EXPERT_WEIGHTS:
            weight = layer.get_parameter(weight_name)
            if hasattr(weight, "device_mesh"):
                raise ValueError(f"{shown} must be quantised before fully_shard, got {weight_name} as a DTensor")
            if not weight.is_meta and not all(bool(of_expert.isfinite().all()) for of_expert in weight.detach()):
                raise ValueError(f"{shown} must have finite weights, got NaN or infinity in {weight_name}")
    for layer in layers.values():
        layer.quantize()
    return module
