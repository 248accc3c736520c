# SPDX-License-Identifier: Apache-2.0
"""How a layer's experts are quantised, and what a quantised layer loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zexpert.ops.quantize_blockwise import quantize_blockwise
from zexpert.runner.placement import EXPERT_SCALES, EXPERT_WEIGHTS

if TYPE_CHECKING:
    from zexpert.layer import FusedMoE

QUANTISED_DTYPES = {
    **dict.fromkeys(EXPERT_WEIGHTS, torch.float8_e4m3fn),
    **dict.fromkeys(EXPERT_SCALES, torch.float32),
}
"""Parameters of a layer with quantization="fp8_block" that do not have its params_dtype."""


def check_quantization(quantization: object) -> None:
    """Raises ValueError unless it is a name of a format."""
    if quantization != "fp8_block":
        raise ValueError(f'quantization must be "fp8_block", got {quantization!r}')


def quantize_weight(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """w13_weight or w2_weight, [R, ...], and its scales. Gate and up have blocks of their own."""
    if name != "w13_weight":
        return quantize_blockwise(weight)
    quantised, scale_inv = quantize_blockwise(weight.unflatten(1, (2, -1)))
    return quantised.flatten(1, 2), scale_inv.flatten(1, 2)


def check_not_quantised(name: str, given: Tensor) -> None:
    """Raises RuntimeError if the entry `name` of a state dict holds integers or float8, whose values need a scale."""
    if not given.is_floating_point() or given.element_size() < 2:
        raise RuntimeError(f"{name} must be of a floating-point dtype that needs no scale, got {given.dtype}")


def check_quantised(parameter: str, name: str, given: Tensor) -> None:
    """Raises RuntimeError unless the entry `name` of a state dict can be the quantised weight or the scales
    `parameter`."""
    expected = QUANTISED_DTYPES[parameter]
    if given.dtype != expected:
        raise RuntimeError(f"{name} must be {expected} in a quantised layer, got {given.dtype}")
    if parameter in EXPERT_SCALES and not given.is_meta:
        values = given.to_local() if hasattr(given, "to_local") else given
        wrong = values[~(values >= 0) | values.isinf()]
        if wrong.numel() > 0:
            raise RuntimeError(f"{name} must be finite and not negative, got {float(wrong[0])}")


def is_quantisable(given: Tensor) -> bool:
    """True for a tensor of a dtype that quantize_blockwise accepts."""
    return given.is_floating_point() and given.element_size() >= 2


def check_has_scales(weights: Iterable[str], state_dict: Mapping[str, object]) -> None:
    """Raises RuntimeError if one of the entries `weights` is quantised and has no scales with it."""
    for name in weights:
        given = state_dict.get(name)
        if isinstance(given, Tensor) and not is_quantisable(given) and f"{name}_scale_inv" not in state_dict:
            raise RuntimeError(f"{name}_scale_inv must be given with {name}, whose values need a scale, got none")


def quantize_state_dict(layer: FusedMoE, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Pre-hook of load_state_dict: quantises the weights for a quantised layer."""
    if layer.quantization is None:
        return
    for name in EXPERT_WEIGHTS:
        given, scales = state_dict.get(prefix + name), f"{prefix}{name}_scale_inv"
        if not isinstance(given, Tensor) or hasattr(given, "device_mesh") or not is_quantisable(given):
            continue
        if scales in state_dict:
            raise RuntimeError(f"{prefix}{name} must be torch.float8_e4m3fn with {scales}, got {given.dtype}")
        if given.dim() == 3 and layer.placement.fits(name, layer.get_parameter(name), given):
            state_dict[prefix + name], state_dict[scales] = quantize_weight(name, given.detach())
