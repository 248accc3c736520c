# SPDX-License-Identifier: Apache-2.0
"""What routers have in common: checks, the expert map with its load record, the capture callback."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zexpert._C import RoutingSpec
from zexpert._values import values_kept
from zexpert.ops.moe_plan import moe_plan
from zexpert.ops.types import DispatchPlan, RoutingArguments, RoutingResult
from zexpert.router.fused_moe_router import FusedMoERouter

INDICES_DTYPES = (torch.int32, torch.int64)


class BaseRouter(FusedMoERouter):
    """Template of a router: `select_experts` checks its inputs, calls `_compute_routing`, shows the choice to the
    capture callback and maps logical experts to physical ones. Subclasses implement `_compute_routing`.

    Args:
        spec: the validated description of the routing.
        e_score_correction_bias: [N], any floating dtype, added to the scores for selection only. Kept by reference,
            as a parameter if it is one, else as a buffer: the next call sees what a controller writes into it.
        indices_dtype: dtype of topk_ids, torch.int32 or torch.int64.

    Raises:
        ValueError: if the bias has another length than the spec has experts, or is not a floating vector, or if
            indices_dtype is neither of the two.
    """

    e_score_correction_bias: Tensor | None
    logical_to_physical_map: Tensor | None
    expert_load: Tensor | None
    arguments: RoutingArguments
    top_k: int
    num_real_experts: int
    num_logits: int | None  # N; None: the logits' width decides
    num_identity_experts: int | None  # None: all that are neither real nor constant
    num_constant_experts: int
    renormalize: bool
    routed_scaling_factor: float

    # What torch.jit.script leaves out of a scripted router.
    __jit_ignored_attributes__ = ["_capture_fn", "_keywords", "spec"]  # noqa: RUF012

    def __init__(
        self,
        spec: RoutingSpec,
        *,
        e_score_correction_bias: Tensor | None = None,
        indices_dtype: torch.dtype = torch.int32,
    ) -> None:
        super().__init__()
        if indices_dtype not in INDICES_DTYPES:
            raise ValueError(f"indices_dtype must be torch.int32 or torch.int64, got {indices_dtype}")
        check_bias(e_score_correction_bias, spec)
        self.spec = spec
        self.indices_dtype = indices_dtype

        self.arguments = RoutingArguments.of(spec)
        for field, value in self.arguments._asdict().items():
            setattr(self, field, value)
        self.num_logits = spec.num_logits
        self.has_zero_experts = self.num_identity_experts != 0 or self.num_constant_experts > 0

        if isinstance(e_score_correction_bias, nn.Parameter):
            self.register_parameter("e_score_correction_bias", e_score_correction_bias)
        else:
            self.register_buffer("e_score_correction_bias", e_score_correction_bias)
        self.register_buffer("logical_to_physical_map", None, persistent=False)
        self.register_buffer("expert_load", None, persistent=False)
        self._num_mapped_experts: int = 0  # physical ones, as the map had it when it was set
        self._capture_fn: Callable[[RoutingResult], None] | None = None

    @property
    def num_experts(self) -> int | None:
        """The older name of num_logits, for one release."""
        return self.num_logits

    def reset_parameters(self) -> None:
        """Does nothing, because the caller sets the bias. FSDP calls this for every module that has tensors."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BaseRouter":
        with values_kept(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def set_capture_fn(self, capture_fn: Callable[[RoutingResult], None] | None) -> None:
        """Calls `capture_fn` with every later choice of this router, or stops doing so for None.

        The callback gets the RoutingResult before the expert map: logical expert ids. It sees every slot of every
        token; a slot that chose a zero expert is there with id -1 and weight 0, and its weight is in zero_weight or
        constant_weight. The tensors are the ones in use: a callback that keeps them for later does not modify them.
        Under torch.compile the callback is traced like any code; a scripted router has none.
        """
        self._capture_fn = capture_fn

    def set_expert_map(self, logical_to_physical_map: Tensor | None, expert_load: Tensor | None = None) -> None:
        """Maps the logical experts that tokens choose to the physical experts that weights are stored for.

        Token t uses replica t modulo the number of replicas, so the choice is repeatable. Both tensors are kept by
        reference (as buffers outside of the state dict): a balancer updates them in place.

        Args:
            logical_to_physical_map: [R, max_replicas], int32 or int64: the physical experts of each logical expert,
                padded with -1 at the end; None removes the map and the record.
            expert_load: [P], int32 or int64: counts the slots routed to each physical expert, added to by every call.

        Raises:
            ValueError: if a tensor has another shape or dtype, a logical expert has no replica, a -1 stands before a
                replica, or a physical expert is out of range. The router is unchanged then.
        """
        if logical_to_physical_map is None:
            if expert_load is not None:
                raise ValueError("expert_load needs a logical_to_physical_map, got None")
        else:
            check_expert_map(logical_to_physical_map, expert_load, self.num_real_experts)
        self.logical_to_physical_map = logical_to_physical_map
        self.expert_load = expert_load
        self._num_mapped_experts = 0 if logical_to_physical_map is None else int(logical_to_physical_map.max()) + 1

    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        """See FusedMoERouter.select_experts; topk_ids are physical experts where an expert map is set.

        Raises:
            ValueError: if hidden_states or router_logits is not a tensor of two dimensions, they differ in tokens or
                device, the logits are not floating point or not as wide as the router has experts, or the bias is on
                another device.
        """
        self._check_inputs(hidden_states, router_logits)
        routing = self._compute_routing(hidden_states, router_logits)
        if routing.topk_ids.dtype != self.indices_dtype:
            routing = self._with_indices_dtype(routing)
        self._observe(hidden_states, routing)
        expert_map = self.logical_to_physical_map
        if expert_map is not None:
            routing = self._map_to_physical(routing, expert_map)
        return routing

    def select_experts_and_plan(
        self, hidden_states: Tensor, router_logits: Tensor, num_experts: int
    ) -> tuple[RoutingResult, DispatchPlan]:
        """See FusedMoERouter.select_experts_and_plan.

        Raises:
            ValueError: as select_experts does, or if num_experts is below the physical experts that an expert map named
                when it was set.
        """
        self._check_num_experts(num_experts)
        routing = self.select_experts(hidden_states, router_logits)
        return routing, moe_plan(routing.topk_ids, num_experts)

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        """The choice itself, in logical experts; topk_ids may be of any integer dtype. Inputs are checked."""
        raise NotImplementedError

    def _with_indices_dtype(self, routing: RoutingResult) -> RoutingResult:
        topk_weights, topk_ids, zero_weight, constant_weight = routing
        if topk_ids.dtype == torch.int64:
            # An id out of range stays out of range instead of wrapping. In a script 2**31 would be a float.
            topk_ids = topk_ids.clamp(-2, 0x7FFFFFFF)
        return RoutingResult(topk_weights, topk_ids.to(self.indices_dtype), zero_weight, constant_weight)

    def _observe(self, hidden_states: Tensor, routing: RoutingResult) -> None:
        """Shows a choice, in logical experts, to the capture callback."""
        if not torch.jit.is_scripting():
            if self._capture_fn is not None:
                self._capture_fn(routing)

    def _check_num_experts(self, num_experts: int) -> None:
        if num_experts < self._num_mapped_experts:
            raise ValueError(
                f"num_experts must be at least the {self._num_mapped_experts} physical experts of "
                f"logical_to_physical_map, got {num_experts}"
            )

    def _check_inputs(self, hidden_states: Tensor, router_logits: Tensor) -> None:
        check_tensor("hidden_states", hidden_states)
        check_tensor("router_logits", router_logits)
        if hidden_states.device != router_logits.device:
            raise ValueError(
                f"hidden_states must be on the device of router_logits ({router_logits.device}), "
                f"got {hidden_states.device}"
            )
        # Freezing a script makes this device a constant: the operator checks it there, so that the script can move.
        if not torch.jit.is_scripting():
            bias = self.e_score_correction_bias
            if bias is not None and bias.device != router_logits.device:
                raise ValueError(
                    f"e_score_correction_bias must be on the device of router_logits ({router_logits.device}), "
                    f"got {bias.device}"
                )
        if not router_logits.is_floating_point():
            raise ValueError(f"router_logits must be of a floating-point dtype, got {router_logits.dtype}")
        if hidden_states.dim() != 2:
            raise ValueError(
                f"hidden_states must have 2 dimensions [tokens, hidden_size], got shape {list(hidden_states.shape)}"
            )
        if router_logits.dim() != 2:
            raise ValueError(
                f"router_logits must have 2 dimensions [tokens, experts], got shape {list(router_logits.shape)}"
            )
        if router_logits.size(0) != hidden_states.size(0):
            raise ValueError(
                f"router_logits must have one row per token of hidden_states ({hidden_states.size(0)}), "
                f"got {router_logits.size(0)}"
            )
        num_logits = self.num_logits
        if num_logits is not None and router_logits.size(1) != num_logits:
            raise ValueError(
                f"router_logits must have one column per expert ({num_logits}), got {router_logits.size(1)}"
            )

    def _map_to_physical(self, routing: RoutingResult, expert_map: Tensor) -> RoutingResult:
        logical = routing.topk_ids
        works = logical >= 0
        replicas = expert_map[logical.clamp(min=0).to(torch.int64)].to(torch.int64)
        replica_count = (replicas >= 0).sum(dim=2).clamp(min=1)
        token = torch.arange(logical.size(0), device=logical.device).unsqueeze(1)
        physical = replicas.gather(2, (token % replica_count).unsqueeze(2)).squeeze(2)
        expert_load = self.expert_load
        if expert_load is not None:
            expert_load.scatter_add_(0, physical.clamp(min=0).flatten(), works.flatten().to(expert_load.dtype))
        physical = torch.where(works, physical, torch.full_like(physical, -1)).to(logical.dtype)
        return RoutingResult(routing.topk_weights, physical, routing.zero_weight, routing.constant_weight)

    def extra_repr(self) -> str:
        return repr(self.spec)


def check_tensor(argument: str, value: Tensor) -> None:
    """Raises ValueError unless `value` is the tensor that it is declared to be."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{argument} must be a tensor, got {type(value).__name__}")


def check_bias(bias: Tensor | None, spec: RoutingSpec) -> None:
    """Raises ValueError unless `bias` is None or a floating vector with an entry per expert of `spec`."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise ValueError(f"e_score_correction_bias must be a tensor or None, got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise ValueError(f"e_score_correction_bias must be of a floating-point dtype, got {bias.dtype}")
    if bias.dim() != 1 or (spec.num_logits is not None and bias.size(0) != spec.num_logits):
        expected = "num_logits" if spec.num_logits is None else spec.num_logits
        raise ValueError(
            f"e_score_correction_bias must have shape [{expected}], one entry per expert, got {list(bias.shape)}"
        )


def check_expert_map(expert_map: Tensor, expert_load: Tensor | None, num_real_experts: int) -> None:
    """Raises ValueError unless the map and the load record are as BaseRouter.set_expert_map describes them."""
    check_tensor("logical_to_physical_map", expert_map)
    if expert_load is not None:
        check_tensor("expert_load", expert_load)
    if expert_map.dtype not in INDICES_DTYPES:
        raise ValueError(f"logical_to_physical_map must be of dtype int32 or int64, got {expert_map.dtype}")
    if expert_map.dim() != 2 or expert_map.size(0) != num_real_experts or expert_map.size(1) < 1:
        raise ValueError(
            f"logical_to_physical_map must have shape [{num_real_experts}, max_replicas], got {list(expert_map.shape)}"
        )
    is_replica = expert_map >= 0
    if not bool(is_replica[:, 0].all()):
        expert = int((~is_replica[:, 0]).int().argmax())
        raise ValueError(f"logical_to_physical_map must name a replica of every expert, got none for expert {expert}")
    if bool((is_replica[:, 1:] & ~is_replica[:, :-1]).any()) or int(expert_map.min()) < -1:
        raise ValueError("logical_to_physical_map must be padded with -1 after the replicas of each expert only")
    if int(expert_map.max()) >= 2**31:
        raise ValueError(f"logical_to_physical_map must hold values below 2**31, got {int(expert_map.max())}")
    if expert_load is None:
        return
    if expert_load.dtype not in INDICES_DTYPES or expert_load.dim() != 1:
        raise ValueError(
            f"expert_load must be a vector of dtype int32 or int64, got shape {list(expert_load.shape)} "
            f"of {expert_load.dtype}"
        )
    if int(expert_map.max()) >= expert_load.size(0):
        raise ValueError(
            f"expert_load must have an entry for every physical expert, the largest of which is "
            f"{int(expert_map.max())}, got {expert_load.size(0)} entries"
        )
