# SPDX-License-Identifier: Apache-2.0
"""Experts of a checkpoint with a module list: a tensor per expert and projection, each copied to its place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zexpert.layer import FusedMoE
from zexpert.layer_quantization import (
    QUANTISED_DTYPES,
    check_not_quantised,
    check_quantised,
    is_quantisable,
    quantize_weight,
)
from zexpert.ops.quantize_blockwise import num_scale_blocks, quantize_blockwise
from zexpert.runner.placement import EXPERT_SCALES, EXPERT_WEIGHTS


class ExpertTensor(NamedTuple):
    """The place of a checkpoint's tensor in the weights of a FusedMoE.

    Attributes:
        weight: the name of the FusedMoE's parameter, [R, ...].
        expert: the index of the expert in it.
        half: 0 or 1 for the gate's or up's half of w13_weight or its scales; None for all of the expert.
        shape: of the tensor.
    """

    weight: str
    expert: int
    half: int | None
    shape: list[int]


def module_list(experts: FusedMoE, name: str, *, gate_proj: bool) -> dict[str, ExpertTensor]:
    """The tensors of the real experts' module list, by name.

    Args:
        experts: the layer.
        name: of an expert, such as "experts.{}.".
        gate_proj: True for gate_proj.weight [F, H] and up_proj.weight [F, H]; False for one up_proj.weight [2F, H],
            gate rows first. Both have down_proj.weight [H, F].
    """
    hidden_size, intermediate_size = experts.hidden_size, experts.intermediate_size
    projections: list[tuple[str, str, int | None, list[int]]] = [
        ("up_proj", "w13_weight", None, [2 * intermediate_size, hidden_size]),
        ("down_proj", "w2_weight", None, [hidden_size, intermediate_size]),
    ]
    if gate_proj:
        one_projection = [intermediate_size, hidden_size]
        projections[:1] = [("gate_proj", "w13_weight", 0, one_projection), ("up_proj", "w13_weight", 1, one_projection)]
    listed = {
        f"{name.format(expert)}{projection}.weight": ExpertTensor(weight, expert, half, shape)
        for expert in range(experts.num_experts)
        for projection, weight, half, shape in projections
    }
    if experts.quantization is None:
        return listed
    return listed | {
        f"{key}_scale_inv": ExpertTensor(f"{place.weight}_scale_inv", place.expert, place.half, shape_of_scales(place))
        for key, place in listed.items()
    }


def shape_of_scales(place: ExpertTensor) -> list[int]:
    """Of a quantised tensor. Gate and up have blocks of their own."""
    rows, columns = place.shape
    num_parts = 2 if place.weight == "w13_weight" and place.half is None else 1
    return [num_parts * num_scale_blocks(rows // num_parts), num_scale_blocks(columns)]


def quantised(place: ExpertTensor, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor in float8, and its scales."""
    if place.half is not None:
        return quantize_blockwise(tensor)
    weight, scale_inv = quantize_weight(place.weight, tensor.unsqueeze(0))
    return weight[0], scale_inv[0]


class ExpertLoader:
    """Copies the tensors of a module list into a FusedMoE's weights, over one or more calls of load_state_dict.

    Attributes:
        complete: the weights that the last call completed.
        missing: names that no call has given yet, of the weights that the last call filled in part.
    """

    def __init__(self) -> None:
        self.complete: set[str] = set()
        self.missing: list[str] = []
        self._loaded: dict[str, set[str]] = {}  # by weight: names that earlier calls gave, until it is complete
        self._given: dict[str, Tensor] = {}  # by name: the tensors of this call
        self._places: dict[str, ExpertTensor] = {}

    def take(self, places: dict[str, ExpertTensor], state_dict: dict[str, Any], prefix: str) -> None:
        """Moves the tensors of `places` under `prefix` out of `state_dict`. Nothing is copied yet.

        Raises:
            RuntimeError: if one has another shape, is float8 for weights that are not, or scales are not float32.
        """
        self._places, self._given = places, {}
        is_quantised = any(place.weight in EXPERT_SCALES for place in places.values())
        for name, place in places.items():
            tensor = state_dict.get(prefix + name)
            if tensor is None:
                continue
            if not is_quantised or place.weight not in QUANTISED_DTYPES:
                check_not_quantised(prefix + name, tensor)
            elif place.weight in EXPERT_SCALES or not is_quantisable(tensor):
                check_quantised(place.weight, prefix + name, tensor)
            elif f"{prefix}{name}_scale_inv" in state_dict:
                raise RuntimeError(
                    f"{prefix}{name} must be torch.float8_e4m3fn with {prefix}{name}_scale_inv, got {tensor.dtype}"
                )
            if list(tensor.shape) != place.shape:
                raise RuntimeError(f"{prefix}{name} must have shape {place.shape}, got {list(tensor.shape)}")
            self._given[name] = tensor
        for name in list(self._given):
            del state_dict[prefix + name]
            if is_quantised and is_quantisable(self._given[name]) and self._places[name].weight in EXPERT_WEIGHTS:
                given = quantised(self._places[name], self._given[name].detach())
                self._given[name], self._given[f"{name}_scale_inv"] = given

    def fill(self, experts: FusedMoE, assign: bool) -> dict[str, Tensor]:
        """Copies what `take` found.

        Args:
            experts: the layer.
            assign: as in load_state_dict: a weight on another device, such as meta, or in another dtype than the
                checkpoint's is replaced by a new one.

        Returns:
            The weights that it filled, by name.
        """
        filled: dict[str, Tensor] = {}
        self.complete, self.missing = set(), []
        for weight in {place.weight: None for place in self._places.values()}:
            names = [name for name, place in self._places.items() if place.weight == weight]
            given = [name for name in names if name in self._given]
            if not given:
                continue
            loaded = self._loaded.pop(weight, set())
            if not loaded.isdisjoint(given):
                loaded = set()  # another checkpoint
            first = self._given[given[0]]
            parameter: Tensor = experts.get_parameter(weight)
            if hasattr(parameter, "device_mesh"):
                raise RuntimeError(f"{given[0]} must be loaded before fully_shard, got a weight that is a DTensor")
            if assign and not loaded:
                parameter = replaced_like(experts, weight, first)
            for name in given:
                copy_expert(experts, parameter, self._places[name], self._given.pop(name))
            loaded.update(given)
            # A weight without memory stays without. PyTorch warns of that when it gets values for it.
            filled[weight] = first.new_empty(()).expand(parameter.shape) if parameter.is_meta else parameter
            if len(loaded) == len(names):
                self.complete.add(weight)
            else:
                self._loaded[weight] = loaded
                self.missing += [name for name in names if name not in loaded]
        self._places = {}
        return filled


def replaced_like(experts: FusedMoE, weight: str, like: Tensor) -> nn.Parameter:
    """The parameter `weight` of the layer, on the device and in the dtype of `like`. A new one is filled with NaN: an
    expert that no shard contains then shows."""
    parameter = experts.get_parameter(weight)
    if parameter.device == like.device and parameter.dtype == like.dtype:
        return parameter
    values = torch.full(parameter.shape, torch.nan, dtype=like.dtype, device=like.device)
    parameter = nn.Parameter(values, requires_grad=parameter.requires_grad)
    setattr(experts, weight, parameter)
    return parameter


@torch.no_grad()
def copy_expert(experts: FusedMoE, parameter: Tensor, place: ExpertTensor, tensor: Tensor) -> None:
    """Copies one tensor of a checkpoint into `parameter`: this rank's part of it, if ranks share the experts."""
    rows = [place.expert]
    if place.weight in experts.placement.whole_shapes:
        rows = (experts.placement.own_experts() == place.expert).nonzero().flatten().tolist()
        tensor = experts.placement.own_slice(place.weight, tensor)
    for row in rows:
        target = parameter[row]
        (target if place.half is None else target.chunk(2)[place.half]).copy_(tensor)
