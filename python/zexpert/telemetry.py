# SPDX-License-Identifier: Apache-2.0
"""Counts of the routing: how much expert compute a model uses, and how evenly its experts are loaded."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zexpert._values import values_kept
from zexpert.runner.moe_runner import MoERunner


class RoutingStats(nn.Module):
    """What the routing of one mixture-of-experts layer did since the last reset.

    A runner that has one (see track_routing) calls it with every dispatch plan. It adds to integer buffers on the
    layer's device, in place: no host synchronisation, no graph break, and it works in scripts and CUDA graphs. Read the
    counts when you need them. The buffers are not in the state dict.

    Every forward counts. The bias controllers use only the forwards in training mode (module.training), so validation
    in eval mode does not move a bias. A forward that activation checkpointing repeats in the backward does not count
    again; in a compiled or scripted layer it does.

    Use DistributedDataParallel with broadcast_buffers=False: otherwise rank 0's counts replace those of the other ranks
    at every forward.

    Args:
        num_experts: R, the number of real experts; with an expert map, of physical experts.
        top_k: K, slots per token.

    Attributes:
        expert_load: [R] int64, slots of each real expert.
        ffn_slots_histogram: [K + 1] int64, entry k counts the tokens that used k real experts.
        evaluation_load: [R] int64, the part of expert_load that was counted in eval mode.
        evaluation_tokens: int64 scalar, the part of num_tokens that was counted in eval mode.

    Raises:
        ValueError: if num_experts or top_k is less than 1.
    """

    expert_load: Tensor
    ffn_slots_histogram: Tensor
    evaluation_load: Tensor
    evaluation_tokens: Tensor

    # Properties for people; scripts only count.
    __jit_unused_properties__ = [  # noqa: RUF012
        "load_entropy",
        "load_imbalance",
        "mean_ffn_slots",
        "normalized_load_entropy",
        "num_tokens",
        "num_training_tokens",
        "training_load",
        "zero_rate",
    ]

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.num_experts = num_experts
        self.top_k = top_k
        for name, shape in (
            ("expert_load", [num_experts]),
            ("ffn_slots_histogram", [top_k + 1]),
            ("evaluation_load", [num_experts]),
            ("evaluation_tokens", []),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64), persistent=False)

    def forward(self, topk_ids: Tensor, expert_offsets: Tensor) -> None:
        """Counts one routing.

        Args:
            topk_ids: [T, K], int32 or int64, -1 where a slot does no work.
            expert_offsets: [R + 1] int32, from moe_plan of these ids: its differences are the load.
        """
        if not torch.jit.is_scripting():
            if is_recomputation():
                return
        ffn_slots = (topk_ids >= 0).sum(dim=1)
        self.ffn_slots_histogram.scatter_add_(0, ffn_slots, torch.ones_like(ffn_slots))
        load = expert_offsets[1:] - expert_offsets[:-1]
        self.expert_load.add_(load)
        if not self.training:
            self.evaluation_load.add_(load)
            self.evaluation_tokens.add_(topk_ids.size(0))

    # ---- The part that training counted, which controllers read -------------------------------------------------

    @property
    def training_load(self) -> Tensor:
        """[R] int64, slots of each real expert in training mode."""
        return self.expert_load - self.evaluation_load

    @property
    def num_training_tokens(self) -> Tensor:
        """Tokens in training mode, int64."""
        return self.num_tokens - self.evaluation_tokens

    # ---- Figures of all counts: 0-dimensional tensors on the layer's device, NaN without tokens ----------------

    @property
    def num_tokens(self) -> Tensor:
        """Tokens, int64."""
        return self.ffn_slots_histogram.sum()

    @property
    def mean_ffn_slots(self) -> Tensor:
        """Real experts per token, float64: between 0 and K."""
        return self.expert_load.sum().double() / self.num_tokens

    @property
    def zero_rate(self) -> Tensor:
        """Share of the slots that did no work, float64: zero experts, and slots no expert could fill."""
        return 1.0 - self.mean_ffn_slots / self.top_k

    @property
    def load_imbalance(self) -> Tensor:
        """Largest load over mean load of the real experts, float64: 1 is even, R is all on one expert."""
        return self.expert_load.max() / self.expert_load.double().mean()

    @property
    def load_entropy(self) -> Tensor:
        """Entropy of the load over the real experts in nats, float64: -sum p ln p, between 0 and ln R."""
        share = self.expert_load.double() / self.expert_load.sum()
        entropy: Tensor = torch.special.entr(share).sum()
        return entropy

    @property
    def normalized_load_entropy(self) -> Tensor:
        """load_entropy over its largest value ln R, float64: 1 is even, 0 is all on one expert. 1 where R is 1."""
        if self.num_experts == 1:
            return self.load_entropy + 1.0
        return self.load_entropy / math.log(self.num_experts)

    # ---- Objects ----

    def reset(self) -> None:
        """Sets all counts to 0, in place."""
        for counts in self.buffers():
            counts.zero_()

    def reset_parameters(self) -> None:
        """reset, under the name that frameworks call after they have materialised a model."""
        self.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoutingStats":
        with values_kept(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def clone(self) -> "RoutingStats":
        """An independent copy."""
        return copy.deepcopy(self)

    def merge(self, other: "RoutingStats") -> "RoutingStats":
        """Adds `other`'s counts to this object's, in place, and returns this object.

        Raises:
            ValueError: if the two count other numbers of experts or slots.
        """
        if (other.num_experts, other.top_k) != (self.num_experts, self.top_k):
            raise ValueError(
                f"other must count {self.num_experts} experts and {self.top_k} slots per token, got "
                f"{other.num_experts} and {other.top_k}"
            )
        for counts, others in zip(self.buffers(), other.buffers(), strict=True):
            counts.add_(others.to(counts.device))
        return self

    def all_reduced(self, process_group: "dist.ProcessGroup | None" = None) -> "RoutingStats":
        """A copy with the sums over the ranks of `process_group` (None: all ranks). Every rank must call this.
        Without torch.distributed it is a plain copy. This object does not change, so nothing is counted twice later.

        The ranks of a tensor_parallel_group count the same tokens. Pass the data-parallel ranks: otherwise each token
        counts once per rank.
        """
        total = self.clone()
        if is_distributed():
            buffers = list(total.buffers())
            counts = torch.cat([buffer.flatten() for buffer in buffers])
            dist.all_reduce(counts, group=process_group)
            for buffer, summed in zip(buffers, counts.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(summed.view(buffer.shape))
        return total

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists, for a log. Waits for the device."""
        return {
            "num_tokens": int(self.num_tokens),
            "mean_ffn_slots": float(self.mean_ffn_slots),
            "zero_rate": float(self.zero_rate),
            "load_imbalance": float(self.load_imbalance),
            "load_entropy": float(self.load_entropy),
            "normalized_load_entropy": float(self.normalized_load_entropy),
            "ffn_slots_histogram": self.ffn_slots_histogram.tolist(),
            "expert_load": self.expert_load.tolist(),
        }

    def __repr__(self) -> str:
        sizes = f"num_experts={self.num_experts}, top_k={self.top_k}"
        if self.expert_load.is_meta:
            return f"RoutingStats({sizes})"
        tokens = int(self.num_tokens)
        if tokens == 0:
            return f"RoutingStats({sizes}, num_tokens=0)"
        return (
            f"RoutingStats({sizes}, num_tokens={tokens}, mean_ffn_slots={float(self.mean_ffn_slots):.3f}, "
            f"zero_rate={float(self.zero_rate):.3f}, load_imbalance={float(self.load_imbalance):.3f}, "
            f"normalized_load_entropy={float(self.normalized_load_entropy):.3f})"
        )


def is_recomputation() -> bool:
    """True in a forward that runs inside a backward: activation checkpointing repeats it there. Compiled code cannot
    ask: False."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def is_distributed() -> bool:
    """True if there are ranks to reduce over."""
    return dist.is_available() and dist.is_initialized()


def moe_runners(model: nn.Module) -> dict[str, MoERunner]:
    """The runners in `model` by layer name, in the order of its modules.

    Raises:
        ValueError: if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return {
        name.removesuffix("runner").removesuffix("."): module
        for name, module in model.named_modules()
        if isinstance(module, MoERunner)
    }


def track_routing(model: nn.Module, enabled: bool = True) -> dict[str, RoutingStats]:
    """Gives every mixture-of-experts layer in `model` a RoutingStats that its runner fills, or removes them.

    A layer that has one keeps it, with its counts. Call this before torch.jit.script and torch.compile.

    Args:
        model: a FusedMoE layer, a runner, or any module that contains some.
        enabled: False removes the stats.

    Returns:
        The stats by layer name, as collect_routing_stats returns them.
    """
    for runner in moe_runners(model).values():
        if not enabled:
            runner.routing_stats = None
        elif runner.routing_stats is None:
            runner.routing_stats = stats_for(runner)
    return collect_routing_stats(model)


def stats_for(runner: MoERunner) -> RoutingStats:
    """Empty stats with the sizes and on the device of `runner`."""
    router: Any = runner.router
    num_experts = router.num_real_experts
    if router.logical_to_physical_map is not None:
        # The plan is of physical experts: as many as the record counts, or the map names.
        load = router.expert_load
        num_experts = load.numel() if load is not None else int(router.logical_to_physical_map.max()) + 1
    tensors = [*runner.parameters(), *runner.buffers()]
    stats = RoutingStats(num_experts, router.top_k).train(runner.training)
    return stats.to(tensors[0].device) if tensors else stats


def collect_routing_stats(model: nn.Module) -> dict[str, RoutingStats]:
    """The stats of every tracked layer in `model` by layer name. They are the live objects: later forwards add to them.

    A layer's name is its name in the model, such as "layers.0.moe"; "" for `model` itself.
    """
    stats = {}
    for name, runner in moe_runners(model).items():
        if isinstance(runner.routing_stats, RoutingStats):
            stats[name] = runner.routing_stats
    return stats
