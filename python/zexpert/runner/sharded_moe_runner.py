# SPDX-License-Identifier: Apache-2.0
"""What runners whose weights are shared out over ranks have in common: how weights are drawn, saved and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from zexpert.runner.expert_group import ExpertGroup
from zexpert.runner.moe_runner_base import MoERunnerBase

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

EXPERT_WEIGHTS = ("w13_weight", "w2_weight")


class ShardedMoERunner(MoERunnerBase):
    """A runner whose rank holds a part of the layer's w13_weight [R, 2F, H] and w2_weight [R, H, F].

    Attributes:
        group: the ranks.
    """

    group: ExpertGroup

    def own_experts(self) -> Tensor:
        """int64 in host memory: the experts, counted as the router does, whose weights or slices are here, in order."""
        raise NotImplementedError

    def own_slice(self, name: str, experts: Tensor) -> Tensor:
        """What this rank holds of the weights `name` of whole experts, [..., 2F, H] or [..., H, F]."""
        raise NotImplementedError

    def saved_shape(self, name: str, shard: Tensor) -> list[int]:
        """The shape that `sharded` gives this rank's weight `name`."""
        raise NotImplementedError

    def sharded(self, name: str, shard: Tensor) -> DTensor:
        """This rank's weight `name` as a part of all ranks' experts; shares its memory."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("torch.jit.script cannot take a layer whose experts are shared out over ranks")


def draw_experts(layer: nn.Module, name: str, whole_shape: tuple[int, int], bound: float) -> None:
    """Fills a weight uniformly from +-bound, each expert from a seed of its own, drawn from torch's generator."""
    runner, weight = layer.runner, layer.get_parameter(name)
    assert isinstance(runner, ShardedMoERunner)
    seeds = torch.randint(2**31, (layer.num_experts,), device="cpu")  # type: ignore[arg-type]
    if weight.is_meta:
        return
    generator = torch.Generator(weight.device)
    expert = torch.empty(whole_shape, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        for own, seed in zip(weight, seeds[runner.own_experts()].tolist(), strict=True):
            own.copy_(runner.own_slice(name, expert.uniform_(-bound, bound, generator=generator.manual_seed(seed))))


def shard_state_dict(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    """Post-hook of state_dict: weights as DTensors, of which each rank holds its own part."""
    runner = layer.runner
    assert isinstance(runner, ShardedMoERunner)
    for name in EXPERT_WEIGHTS:
        if isinstance(state_dict.get(prefix + name), Tensor):
            state_dict[prefix + name] = runner.sharded(name, state_dict[prefix + name])


def take_own_part(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Pre-hook of load_state_dict: this rank's part in the place of DTensors or of all experts."""
    from torch.distributed.tensor import DTensor

    runner = layer.runner
    assert isinstance(runner, ShardedMoERunner)
    for name in EXPERT_WEIGHTS:
        given = state_dict.get(prefix + name)
        if given is None or not fits_sharded_weight(layer, name, given):
            continue
        own = layer.get_parameter(name)
        if isinstance(given, DTensor):
            placements = runner.sharded(name, own).placements
            state_dict[prefix + name] = given.redistribute(placements=placements).to_local().reshape(own.shape)
        else:
            own_part = runner.own_slice(name, given[runner.own_experts().to(given.device)])
            state_dict[prefix + name] = own_part.contiguous()


def whole_weight(layer: nn.Module, name: str) -> Tensor:
    """The weight `name` of all experts, as one process has it; where ranks hold parts, all of them call this."""
    weight, runner = layer.get_parameter(name).detach(), layer.runner
    if not isinstance(runner, ShardedMoERunner):
        return weight
    whole: Tensor = runner.sharded(name, weight).full_tensor().flatten(1, -2)
    return whole


def fits_sharded_weight(layer: nn.Module, name: str, given: Tensor) -> bool:
    """Whether `given` holds the weight `name` of all experts: a DTensor as `sharded` makes them, or [R, ...] as one
    process has them."""
    from torch.distributed.tensor import DTensor

    whole = unsharded_shape(layer, name)
    if whole is None:
        return False
    if isinstance(given, DTensor):
        runner: Any = layer.runner
        whole = runner.saved_shape(name, layer.get_parameter(name))
    return list(given.shape) == whole


def unsharded_shape(layer: nn.Module, name: str) -> list[int] | None:
    """[R, ...], the shape that one process gives the weight `name`; None if it is not shared out over ranks."""
    if name not in EXPERT_WEIGHTS or not isinstance(getattr(layer, "runner", None), ShardedMoERunner):
        return None
    sizes: Any = layer
    if name == "w2_weight":
        return [sizes.num_experts, sizes.hidden_size, sizes.intermediate_size]
    return [sizes.num_experts, 2 * sizes.intermediate_size, sizes.hidden_size]
