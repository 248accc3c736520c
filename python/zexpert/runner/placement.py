# SPDX-License-Identifier: Apache-2.0
"""Which part of a layer's experts a process holds: shapes, initial values, state dicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zexpert.ops.quantize_blockwise import SCALE_BLOCK, num_scale_blocks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from zexpert.router.fused_moe_router import FusedMoERouter
    from zexpert.runner.expert_group import ExpertGroup

EXPERT_WEIGHTS = ("w13_weight", "w2_weight")
EXPERT_SCALES = ("w13_weight_scale_inv", "w2_weight_scale_inv")
"""Of quantised weights."""


class WholeExperts:
    """All experts, whole: one process, or ranks that hold copies.

    A layer calls `place` first. `name` is one of EXPERT_WEIGHTS in all methods, and after `place_scales` also one of
    EXPERT_SCALES.
    """

    def __init__(self) -> None:
        self.whole_shapes: dict[str, tuple[int, ...]] = {}

    def place(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        """Sets the sizes of the whole layer."""
        self.whole_shapes = {
            "w13_weight": (num_experts, 2 * intermediate_size, hidden_size),
            "w2_weight": (num_experts, hidden_size, intermediate_size),
        }

    def check_blocks(self) -> None:
        """Raises ValueError if the parts of processes cut blocks that share a scale."""

    def place_scales(self) -> None:
        """Sets the sizes of the scales: the weights are quantised. Raises ValueError as check_blocks does."""
        self.check_blocks()
        num_experts, hidden_size, intermediate_size = self.whole_shapes["w2_weight"]
        hidden_blocks, inner_blocks = num_scale_blocks(hidden_size), num_scale_blocks(intermediate_size)
        self.whole_shapes["w13_weight_scale_inv"] = (num_experts, 2 * inner_blocks, hidden_blocks)
        self.whole_shapes["w2_weight_scale_inv"] = (num_experts, hidden_blocks, inner_blocks)

    def local_shape(self, name: str) -> tuple[int, ...]:
        """The shape of this process's weight."""
        return self.whole_shapes[name]

    def own_experts(self) -> Tensor:
        """int64 on the CPU: the expert, as the router counts them, that each row of this process's weights is (a part)
        of."""
        return torch.arange(self.whole_shapes["w2_weight"][0])

    def own_slice(self, name: str, experts: Tensor) -> Tensor:
        """This process's part of the weights of whole experts, [..., 2F, H] or [..., H, F], or of their gate or up rows
        alone, [..., F, H]."""
        return experts

    def draw(self, name: str, weight: Tensor, bound: float) -> None:
        """Fills this process's weight uniformly from +-bound."""
        nn.init.uniform_(weight, -bound, bound)

    def fits(self, name: str, weight: Tensor, given: Tensor) -> bool:
        """True if load_state_dict can fill this process's weight from `given`."""
        return given.shape == weight.shape

    def loadable_shapes(self, name: str, weight: Tensor) -> list[list[int]]:
        """The shapes of plain tensors that fit, for messages."""
        return [list(weight.shape)]

    def whole(self, name: str, weight: Tensor) -> Tensor:
        """The weight of all experts, as one process has it. Where ranks hold parts, all of them must call this."""
        return weight

    def register_hooks(self, layer: nn.Module) -> None:
        """Makes the layer's state_dict and load_state_dict follow this placement."""


class ShardedExperts(WholeExperts):
    """A part of the experts on each rank of a group.

    Attributes:
        group: the ranks.
    """

    def __init__(self, group: ExpertGroup) -> None:
        super().__init__()
        self.group = group

    def saved_shape(self, name: str) -> list[int]:
        """The shape of what `sharded` makes."""
        raise NotImplementedError

    def sharded(self, name: str, shard: Tensor) -> DTensor:
        """This rank's weight, or a tensor of its shape, as a part of all ranks' weight; shares its memory."""
        raise NotImplementedError

    def draw(self, name: str, weight: Tensor, bound: float) -> None:
        """Draws each expert from a seed of its own, which comes from torch's generator: ranks that are seeded alike
        draw the same layer for any number of ranks."""
        num_experts, *expert_shape = self.whole_shapes[name]
        seeds = torch.randint(2**31, (num_experts,), device="cpu")
        if weight.is_meta:
            return
        generator = torch.Generator(weight.device)
        expert = torch.empty(expert_shape, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            for own, seed in zip(weight, seeds[self.own_experts()].tolist(), strict=True):
                expert.uniform_(-bound, bound, generator=generator.manual_seed(seed))
                own.copy_(self.own_slice(name, expert))

    def fits(self, name: str, weight: Tensor, given: Tensor) -> bool:
        """Also a DTensor as `sharded` makes them, and the weight of all experts, [R, ...]."""
        from torch.distributed.tensor import DTensor

        if isinstance(given, DTensor):
            return list(given.shape) == self.saved_shape(name)
        return given.shape in (weight.shape, self.whole_shapes[name])

    def loadable_shapes(self, name: str, weight: Tensor) -> list[list[int]]:
        shapes = [list(weight.shape), list(self.whole_shapes[name])]
        return shapes if shapes[0] != shapes[1] else shapes[:1]

    def whole(self, name: str, weight: Tensor) -> Tensor:
        # Not every backend exchanges float8.
        bytes_of_float8 = weight.view(torch.uint8) if weight.element_size() == 1 else weight
        gathered: Tensor = self.sharded(name, bytes_of_float8).full_tensor()
        return gathered.flatten(1, -2).view(weight.dtype)

    def own_part(self, name: str, weight: Tensor, given: Tensor) -> Tensor:
        """What load_state_dict copies into this process's weight: of a DTensor and of all experts, this rank's part."""
        from torch.distributed.tensor import DTensor

        if not self.fits(name, weight, given):
            return given
        if isinstance(given, DTensor):
            placements = self.sharded(name, weight).placements
            return given.redistribute(placements=placements).to_local().reshape(weight.shape)
        if given.shape == weight.shape and given.shape != self.whole_shapes[name]:
            return given
        return self.own_slice(name, given[self.own_experts().to(given.device)]).contiguous()

    def register_hooks(self, layer: nn.Module) -> None:
        layer.register_state_dict_post_hook(shard_state_dict)
        layer.register_load_state_dict_pre_hook(take_own_part)


def shard_state_dict(layer: Any, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    """Post-hook of state_dict: weights as DTensors, of which each rank holds its own part."""
    for name in layer.placement.whole_shapes:
        if isinstance(state_dict.get(prefix + name), Tensor):
            state_dict[prefix + name] = layer.placement.sharded(name, state_dict[prefix + name])


def take_own_part(layer: Any, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Pre-hook of load_state_dict: this rank's part replaces DTensors and the weights of all experts."""
    for name in layer.placement.whole_shapes:
        if isinstance(state_dict.get(prefix + name), Tensor):
            weight = layer.get_parameter(name)
            state_dict[prefix + name] = layer.placement.own_part(name, weight, state_dict[prefix + name])


class ExpertParallelPlacement(ShardedExperts):
    """Whole experts, spread over ranks: rank p holds the physical experts p * E / P to (p + 1) * E / P - 1.

    Args:
        num_experts: E. The router's expert map says which expert a physical one is a replica of; without a map E = R.
    """

    def __init__(self, group: ExpertGroup, router: FusedMoERouter, num_experts: int) -> None:
        super().__init__(group)
        self.router = router
        self.num_experts = num_experts
        self.num_local_experts = num_experts // group.size

    def local_shape(self, name: str) -> tuple[int, ...]:
        return (self.num_local_experts, *self.whole_shapes[name][1:])

    def own_experts(self) -> Tensor:
        expert_map = self.router.logical_to_physical_map
        logical = torch.arange(self.num_experts)
        if isinstance(expert_map, Tensor):
            replicas = expert_map.cpu().long()
            owners = torch.arange(replicas.size(0)).unsqueeze(1).expand_as(replicas)
            logical[replicas[replicas >= 0]] = owners[replicas >= 0]
        return logical.chunk(self.group.size)[self.group.rank]

    def saved_shape(self, name: str) -> list[int]:
        return [self.num_experts, *self.whole_shapes[name][1:]]

    def sharded(self, name: str, shard: Tensor) -> DTensor:
        """[E, ...], by physical experts."""
        return self.group.as_sharded(shard, dim=0)


class TensorParallelPlacement(ShardedExperts):
    """A slice of every expert on each rank: F / P of its gate and up rows and of its down columns.

    Args:
        local_intermediate_size: F / P.
    """

    def __init__(self, group: ExpertGroup, local_intermediate_size: int) -> None:
        super().__init__(group)
        self.local_intermediate_size = local_intermediate_size

    def check_blocks(self) -> None:
        if self.group.size > 1 and self.local_intermediate_size % SCALE_BLOCK != 0:
            raise ValueError(
                f"intermediate_size must be a multiple of {SCALE_BLOCK} for each rank of tensor_parallel_group with "
                f"quantised weights, which have blocks of {SCALE_BLOCK} with one scale, got "
                f"{self.local_intermediate_size} for each of {self.group.size}"
            )

    def local_shape(self, name: str) -> tuple[int, ...]:
        num_experts, rows, columns = self.whole_shapes[name]
        if self.cuts_columns(name):
            return num_experts, rows, columns // self.group.size
        return num_experts, rows // self.group.size, columns

    def cuts_columns(self, name: str) -> bool:
        """True for w2_weight and its scales, whose columns are cut; those of w13_weight are cut in their rows."""
        return name.startswith("w2_")

    def own_slice(self, name: str, experts: Tensor) -> Tensor:
        _, rows, columns = self.local_shape(name)
        if self.cuts_columns(name):
            return experts.narrow(-1, self.group.rank * columns, columns)
        size = rows // 2  # of gate, and of up
        if experts.size(-2) == size * self.group.size:
            return experts.narrow(-2, self.group.rank * size, size)
        gate_up = experts.unflatten(-2, (2, -1)).narrow(-2, self.group.rank * size, size)
        own: Tensor = gate_up.flatten(-3, -2)
        return own

    def saved_shape(self, name: str) -> list[int]:
        num_experts, rows, columns = self.whole_shapes[name]
        return [num_experts, rows, columns] if self.cuts_columns(name) else [num_experts, 2, rows // 2, columns]

    def sharded(self, name: str, shard: Tensor) -> DTensor:
        """w2_weight as [R, H, F], w13_weight as [R, 2, F, H], gate and up: the cut dimension is whole in these."""
        if self.cuts_columns(name):
            return self.group.as_sharded(shard, dim=2)
        return self.group.as_sharded(shard.unflatten(1, (2, -1)), dim=2)
