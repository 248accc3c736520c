# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from zexpert._autocast import autocast_dtype, weights_to
from zexpert._C import ScoringFunc, ZeroExpertType
from zexpert.experts.factory import create_experts
from zexpert.layer_quantization import (
    QUANTISED_DTYPES,
    check_has_scales,
    check_not_quantised,
    check_quantised,
    check_quantization,
    is_quantisable,
    quantize_state_dict,
    quantize_weight,
)
from zexpert.ops.types import ConstantExperts, ExpertWeights
from zexpert.router.base_router import BaseRouter, check_tensor
from zexpert.router.custom_routing_router import CustomRoutingFunction
from zexpert.router.factory import create_fused_moe_router
from zexpert.router.zero_expert_spec import ZeroExperts, kind_name
from zexpert.runner.factory import create_moe_runner
from zexpert.runner.moe_runner import MoERunner
from zexpert.runner.placement import EXPERT_SCALES, EXPERT_WEIGHTS, WholeExperts

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


class FusedMoE(nn.Module):
    """A mixture of real experts, zero experts and shared experts:

        out[t] = sum_k topk_weights[t, k] * FFN_{topk_ids[t, k]}(x[t]) + zero_weight[t] * x[t] + constants[t]
               + shared_experts(x)[t],                FFN(x) = (silu(x @ gate.T) * (x @ up.T)) @ down.T

    A slot that chose a zero expert costs no expert computation. An identity expert gives the token itself, a drop
    expert nothing, and constant expert c gives a1 * x + a2 * v_c with [a1, a2] = softmax(x @ Wc.T) (MoE++, arXiv
    2410.07348). Compute the router's logits yourself: [..., N] with N = real + zero experts, ordered
    [real | identity | constant | drop].

    Parameters (`params_dtype`; R real experts, C constant experts, H hidden size, F intermediate size):
        w13_weight [R, 2F, H]: gate rows, then up rows, of each expert; with an expert_parallel_group of P ranks
            [E / P, 2F, H], this rank's of E physical experts (E = R without a logical_to_physical_map).
        w2_weight [R, H, F]: down projection of each expert; likewise [E / P, H, F].
        constant_gate_weight [C, 2, H] and constant_vectors [C, H]: Wc and v_c; None without constant experts.
        w13_weight_scale_inv [R, 2 * ceil(F / 128), ceil(H / 128)] and w2_weight_scale_inv
            [R, ceil(H / 128), ceil(F / 128)], float32: the scales of quantised weights, gate's, then up's; None without
            quantization.

    Args:
        num_experts: R, real experts.
        top_k: K, experts per token, zero experts included.
        hidden_size: H.
        intermediate_size: F.
        zero_expert_type: "identity" (or "copy"), "constant", "drop" (or "zero"), or the ZeroExpertType; or counts by
            these, such as {"identity": 1, "constant": 2, "drop": 1}; None for no zero experts.
        zero_expert_num: number of zero experts; required with one type and without a bias, since a bias gives the
            number by its length.
        e_score_correction_bias: [N], any floating dtype, for selection only. Kept by reference: the
            next call sees what a controller writes into it. It moves with the layer and is converted with it.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus".
        renormalize: divide a token's weights by their sum.
        routed_scaling_factor: factor on every weight.
        params_dtype: dtype of the parameters, and so of hidden_states; None for torch's default dtype.
        quantization: "fp8_block" for w13_weight and w2_weight in float8_e4m3fn with a scale for each block of 128 x
            128, as zexpert.quantize makes them; None for weights of params_dtype. Quantised weights are not trained.
            Gradients flow to hidden states and logits. hidden_states may be of any floating dtype. load_state_dict
            quantises weights of other dtypes.
        shared_experts: a module called on hidden_states [T, H] that returns [T, H].
        chunk_size: most tokens to compute at a time; None for all.
        expert_parallel_group: ranks to spread the experts over: a torch.distributed.ProcessGroup or a DeviceMesh of one
            dimension, such as mesh["expert"]. Rank p holds physical experts p * E / P to (p + 1) * E / P - 1. See
            ExpertParallelMoERunner for what each rank must do. state_dict holds the experts as DTensors, so that
            torch.distributed.checkpoint loads them under another number of ranks; load_state_dict also accepts whole
            tensors [R, ...], as one process saves them. Seed the ranks alike.
        logical_to_physical_map: [R, max_replicas] int32 or int64, for an expert_parallel_group: the physical experts
            of each expert, each named once, padded with -1 at the end; see BaseRouter.set_expert_map. Slots are counted
            in router.expert_load [E]. Replicas of an expert are trained apart.
        tensor_parallel_group: ranks that hold a slice of every expert each, w13_weight [R, 2F / P, H] and w2_weight
            [R, H, F / P], and are called with the same tokens; see TensorParallelMoERunner.
        use_grouped_topk, num_expert_group, topk_group: choose within the best groups of real experts.
        custom_routing_function: see CustomRoutingRouter.
        drop_before_renormalize: weights of drop experts become 0 before renormalising (MoE++); needs both.
        routing_simulation: see RoutingSimulatorRouter.
        recompute: train in less memory: compute the experts' gate and up again in the backward instead of keeping
            them. About a third more work; the same gradients to rounding.
        experts_backend: "auto", "cpu", "grouped_mm", "hopper" or "torch"; see zexpert.experts.create_experts.
        device: where the parameters are made; None for torch's default device.

    Raises:
        ValueError: if an argument is out of range, is missing with another, or contradicts another.
    """

    w13_weight: nn.Parameter
    w2_weight: nn.Parameter
    w13_weight_scale_inv: Tensor | None
    w2_weight_scale_inv: Tensor | None
    constant_gate_weight: Tensor | None
    constant_vectors: Tensor | None

    # torch.jit.script leaves these properties out.
    __jit_unused_properties__ = [  # noqa: RUF012
        "e_score_correction_bias",
        "experts_backend",
        "placement",
        "router",
        "shared_experts",
    ]
    __jit_ignored_attributes__ = __jit_unused_properties__

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        zero_expert_type: ZeroExperts | None = None,
        zero_expert_num: int | None = None,
        e_score_correction_bias: Tensor | None = None,
        scoring_func: str | ScoringFunc = "softmax",
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        params_dtype: torch.dtype | None = None,
        quantization: str | None = None,
        shared_experts: nn.Module | None = None,
        chunk_size: int | None = None,
        expert_parallel_group: "dist.ProcessGroup | DeviceMesh | None" = None,
        logical_to_physical_map: Tensor | None = None,
        tensor_parallel_group: "dist.ProcessGroup | DeviceMesh | None" = None,
        use_grouped_topk: bool = False,
        num_expert_group: int | None = None,
        topk_group: int | None = None,
        custom_routing_function: CustomRoutingFunction | None = None,
        drop_before_renormalize: bool = False,
        routing_simulation: str | None = None,
        recompute: bool = False,
        experts_backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_experts", num_experts),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
        ):
            if not isinstance(cast(object, size), Integral):
                raise ValueError(f"{name} must be an integer, got {size!r}")
        if hidden_size < 1 or intermediate_size < 1:
            raise ValueError(
                f"hidden_size and intermediate_size must be at least 1, got {hidden_size} and {intermediate_size}"
            )
        if (
            isinstance(zero_expert_type, str | ZeroExpertType)
            and zero_expert_num is None
            and e_score_correction_bias is None
        ):
            raise ValueError(f'zero_expert_num is required with zero_expert_type "{kind_name(zero_expert_type)}"')
        if quantization is not None:
            check_quantization(quantization)
            if isinstance(params_dtype, torch.dtype) and params_dtype.itemsize < 2:
                raise ValueError(f"params_dtype must be that of hidden_states with quantization, got {params_dtype}")
        if params_dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"params_dtype must be float32, float64, bfloat16 or float16, got {params_dtype!r}")
        if not isinstance(cast(object, recompute), bool):
            raise ValueError(f"recompute must be True or False, got {recompute!r}")
        if shared_experts is not None and not isinstance(shared_experts, nn.Module):
            raise ValueError(f"shared_experts must be a torch.nn.Module, got {type(shared_experts).__name__}")

        router = create_fused_moe_router(
            top_k,
            num_experts,
            renormalize=renormalize,
            use_grouped_topk=use_grouped_topk,
            num_expert_group=num_expert_group,
            topk_group=topk_group,
            scoring_func=scoring_func,
            routed_scaling_factor=routed_scaling_factor,
            e_score_correction_bias=e_score_correction_bias,
            custom_routing_function=custom_routing_function,
            zero_expert_type=zero_expert_type,
            zero_expert_num=zero_expert_num,
            num_logical_experts=num_experts,
            drop_before_renormalize=drop_before_renormalize,
            routing_simulation=routing_simulation,
        )
        self.runner: MoERunner = create_moe_runner(
            router,
            create_experts(experts_backend),
            shared_experts,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            chunk_size=chunk_size,
            expert_parallel_group=expert_parallel_group,
            logical_to_physical_map=logical_to_physical_map,
            tensor_parallel_group=tensor_parallel_group,
            device=device,
        )
        self.runner.recompute = recompute

        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.quantization = quantization
        self.params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self.num_constant_experts = router.num_constant_experts
        placement = self.placement
        if quantization is not None:
            placement.place_scales()
        shapes: dict[str, tuple[int, ...] | None] = {name: placement.local_shape(name) for name in EXPERT_WEIGHTS}
        for name in EXPERT_SCALES:
            shapes[name] = placement.local_shape(name) if quantization is not None else None
        has_constants = self.num_constant_experts > 0
        shapes["constant_gate_weight"] = (self.num_constant_experts, 2, hidden_size) if has_constants else None
        shapes["constant_vectors"] = (self.num_constant_experts, hidden_size) if has_constants else None
        for name, shape in shapes.items():
            weight = None
            if shape is not None:
                dtype = params_dtype if quantization is None else QUANTISED_DTYPES.get(name, params_dtype)
                is_trained = quantization is None or name not in QUANTISED_DTYPES
                weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=is_trained)
            self.register_parameter(name, weight)
        self.placement.register_hooks(self)
        register_pre_hook: Callable[..., Any] = self.register_load_state_dict_pre_hook
        register_pre_hook(quantize_state_dict)
        register_pre_hook(check_shapes_of_state_dict)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter uniformly from +-1 / sqrt(fan_in), as nn.Linear does, and leaves the bias.

        Where ranks share the experts, seed them alike: they then draw the same layer for any number of ranks.
        """
        for name in EXPERT_WEIGHTS:
            bound = 1.0 / math.sqrt(self.placement.whole_shapes[name][-1])
            weight = self.get_parameter(name)
            if self.quantization is None:
                self.placement.draw(name, weight, bound)
                continue
            drawn = torch.empty(weight.shape, dtype=self.params_dtype, device=weight.device)
            self.placement.draw(name, drawn, bound)
            with torch.no_grad():
                for target, source in zip(self.quantised(name), quantize_weight(name, drawn), strict=True):
                    target.copy_(source)
        bound = 1.0 / math.sqrt(self.hidden_size)
        for constant in (self.constant_gate_weight, self.constant_vectors):
            if constant is not None:
                nn.init.uniform_(constant, -bound, bound)

    def quantised(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The quantised weight `name` and its scales."""
        return self.get_parameter(name), self.get_parameter(f"{name}_scale_inv")

    def quantize(self) -> None:
        """Quantises the experts in place: see zexpert.quantize, which checks that this is possible."""
        self.placement.place_scales()
        for name in EXPERT_WEIGHTS:
            with torch.no_grad():
                weight, scales = quantize_weight(name, self.get_parameter(name))
            setattr(self, name, nn.Parameter(weight, requires_grad=False))
            setattr(self, f"{name}_scale_inv", nn.Parameter(scales, requires_grad=False))
        self.quantization = "fp8_block"

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """nn.Module.load_state_dict. A quantised layer quantises weights that are not; if strict, it refuses float8
        weights without scales."""
        if self.quantization is not None and strict:
            check_has_scales(EXPERT_WEIGHTS, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedMoE":
        """Moves the layer; quantised weights and their scales keep their dtypes."""
        quantised = [self._parameters.get(name) for name in QUANTISED_DTYPES] if self.quantization is not None else []

        def apply(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype != tensor.dtype and any(tensor is own for own in quantised):
                return tensor.to(applied.device)
            return applied

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def placement(self) -> WholeExperts:
        """Which part of the experts this process holds, part of the runner."""
        return self.runner.placement

    @property
    def router(self) -> BaseRouter:
        """The router, part of the runner."""
        return cast(BaseRouter, self.runner.router)

    @property
    def shared_experts(self) -> nn.Module | None:
        """The shared experts, part of the runner."""
        return self.runner.shared_experts

    @property
    def e_score_correction_bias(self) -> Tensor | None:
        """The router's selection bias [N], the very tensor that routing reads."""
        return self.router.e_score_correction_bias

    @property
    def experts_backend(self) -> str:
        """Name of the experts backend that a call would use now, for tokens of the parameters' device and dtype: "cpu",
        "grouped_mm", "hopper" or "torch". On a GPU it may be another under torch.no_grad()."""
        rows: Tensor = self.w13_weight
        if self.quantization is not None:
            rows = rows.new_empty(0, dtype=self.params_dtype)
        return self.runner.experts.backend_for(rows, self.w2_weight)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        """The layer's output.

        With gradients, other kernels may run than without: the last bits of the results may differ.

        torch.autocast converts hidden states and experts to its dtype, and not the routing: compute the logits in
        float32.

        Args:
            hidden_states: [..., H], of the parameters' dtype; with quantised weights or under autocast any floating
                dtype.
            router_logits: [..., N] with the same leading dimensions, any floating dtype.

        Returns:
            [..., H], dtype of hidden_states; under autocast its dtype.

        Raises:
            ValueError: if an argument is not a tensor, or a shape or a dtype does not fit.
        """
        check_tensor("hidden_states", hidden_states)
        check_tensor("router_logits", router_logits)
        if hidden_states.dim() < 1 or hidden_states.size(-1) != self.hidden_size:
            raise ValueError(
                f"hidden_states must have shape [..., {self.hidden_size}], got {list(hidden_states.shape)}"
            )
        is_flat = hidden_states.dim() == 2 and router_logits.dim() == 2
        shape = hidden_states.shape
        if not is_flat:  # the router compares rows
            if router_logits.dim() < 1 or router_logits.shape[:-1] != hidden_states.shape[:-1]:
                raise ValueError(
                    f"router_logits must have the leading dimensions of hidden_states "
                    f"({list(hidden_states.shape[:-1])}), got shape {list(router_logits.shape)}"
                )
            hidden_states = hidden_states.reshape(-1, self.hidden_size)
            router_logits = router_logits.reshape(-1, router_logits.size(-1))
        weights = self.expert_weights()
        if not torch.jit.is_scripting():
            dtype = autocast_dtype(weights.w13)
            if dtype is not None:
                hidden_states, weights = hidden_states.to(dtype), weights_to(weights, dtype)
        out: Tensor = self.runner(hidden_states, router_logits, weights)
        return out if is_flat else out.reshape(shape)

    def expert_weights(self) -> ExpertWeights:
        """The experts' weights as the runner accepts them."""
        w13: Tensor = self.w13_weight
        w2: Tensor = self.w2_weight
        w13_scale_inv, w2_scale_inv = self.w13_weight_scale_inv, self.w2_weight_scale_inv
        if self.num_constant_experts == 0:
            return ExpertWeights(w13, w2, w13_scale_inv, w2_scale_inv)
        gate_weight, vectors = self.constant_gate_weight, self.constant_vectors
        assert gate_weight is not None
        assert vectors is not None
        return ExpertWeights(w13, w2, w13_scale_inv, w2_scale_inv, ConstantExperts(gate_weight, vectors))

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, dtype={self.w13_weight.dtype}"
            + (f", quantization={self.quantization!r}" if self.quantization is not None else "")
            + (", recompute=True" if self.runner.recompute else "")
        )


def check_shapes_of_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object, shown: Callable[[str], str] = str
) -> None:
    """Pre-hook of load_state_dict: raises RuntimeError, before anything of `module` or its submodules is loaded, if an
    entry has another shape than its parameter or buffer, or is quantised. It skips submodules that load by rules of
    their own. Messages call an entry `shown` of its key.
    """
    for module_name, submodule in module.named_modules(prefix=prefix.removesuffix(".")):
        if type(submodule)._load_from_state_dict is not nn.Module._load_from_state_dict:
            continue
        own = {**submodule._parameters, **submodule._buffers}
        for name, tensor in own.items():
            key = f"{module_name}.{name}" if module_name else name
            given = state_dict.get(key)
            if name in submodule._non_persistent_buffers_set or tensor is None or not isinstance(given, Tensor):
                continue
            if isinstance(submodule, FusedMoE) and submodule.quantization is not None and name in QUANTISED_DTYPES:
                if submodule is module or name in EXPERT_SCALES or not is_quantisable(given):
                    check_quantised(name, shown(key), given)  # the others are quantised by the layer's own hook
            elif tensor.is_floating_point() and tensor.element_size() > 1:
                check_not_quantised(shown(key), given)
            placement = getattr(submodule, "placement", None)
            if not isinstance(placement, WholeExperts) or name not in placement.whole_shapes:
                placement = WholeExperts()
            if not placement.fits(name, tensor, given):
                fitting = " or ".join(map(str, placement.loadable_shapes(name, tensor)))
                raise RuntimeError(f"{shown(key)} must have shape {fitting}, got {list(given.shape)}")
