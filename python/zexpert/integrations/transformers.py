# SPDX-License-Identifier: Apache-2.0
"""zexpert in Hugging Face transformers (version 5).

LongCat-Flash: `from_pretrained` loads a checkpoint in the hub's layout. `patch(model)` makes every LongcatFlashMoE of a
loaded model run on zexpert, and `unpatch(model)` undoes that.

Other mixtures of experts: importing this module registers the experts implementation "zexpert", for
`from_pretrained(..., experts_implementation="zexpert")` and `model.set_experts_implementation("zexpert")`.
It serves fine-grained-fp8 models too.

Importing it needs transformers, the extra `zexpert[transformers]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from zexpert._autocast import autocast_dtype
from zexpert.experts.factory import create_experts
from zexpert.integrations.given_routing import RUNNER
from zexpert.integrations.transformers_loading import from_pretrained
from zexpert.models.config import require_silu
from zexpert.models.float32_linear import float32_linear
from zexpert.ops.quantize_blockwise import SCALE_BLOCK
from zexpert.ops.types import ExpertWeights
from zexpert.router.factory import create_fused_moe_router
from zexpert.runner.chunking_moe_runner import ChunkingMoERunner
from zexpert.runner.default_moe_runner import DefaultMoERunner
from zexpert.runner.moe_runner import MoERunner

try:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.longcat_flash.modeling_longcat_flash import (
        LongcatFlashExperts,
        LongcatFlashMoE,
        LongcatFlashPreTrainedModel,
        LongcatFlashTopkRouter,
    )
except ImportError as error:
    raise ImportError(
        f"zexpert.integrations.transformers needs transformers 5 ({error}): pip install 'zexpert[transformers]'"
    ) from error

try:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
except ImportError:  # early versions of transformers 5
    ALL_FP8_EXPERTS_FUNCTIONS = None
__all__ = ["EXPERTS_IMPLEMENTATION", "experts_forward", "from_pretrained", "patch", "unpatch"]

#: The name of zexpert's experts in transformers.
EXPERTS_IMPLEMENTATION = "zexpert"

#: accelerate, which spreads a model over devices, replaces a module's forward and keeps the previous one.
FORWARD_ATTRIBUTES = ("forward", "_old_forward")

#: The modules of the activations "silu" and "swish" in transformers.
SILU_MODULES = (nn.SiLU, type(ACT2FN["silu"]))


def patch(
    model: nn.Module,
    *,
    free_unused_weights: bool = False,
    chunk_size: int | None = None,
    recompute: bool = False,
    experts_backend: str = "auto",
) -> nn.Module:
    """Makes every LongcatFlashMoE in `model` run on zexpert, in place: routing, experts and epilogue.

    Parameters and buffers stay the same objects, under their names: optimisers, state dicts, save_pretrained and
    recorded router logits work as before. Each layer gets a submodule `runner` without weights, a zexpert MoERunner, so
    zexpert.telemetry and the bias controllers of zexpert.training work on the model. Results differ from transformers'
    by rounding: terms are summed in float32 and rounded once, and under autocast the router stays in float32. A layer
    that is patched already is patched again.

    The experts are still called as a module, so what wraps them works: LoRA of PEFT (target_parameters, before or after
    the patch), fully_shard of mlp.experts (after the patch), accelerate's offloading of mlp.experts.

    Args:
        model: a LongCat-Flash model of transformers, or any module that contains LongcatFlashMoE layers.
        free_unused_weights: free the memory of gate_up_proj's rows for zero experts, zero_expert_num of
            n_routed_experts + zero_expert_num, which transformers allocates and never reads. The parameter stays the
            same object and loses its gradient; state dicts have the rows, as zeros, all the same. Free them before an
            optimiser's first step, because its state has the parameter's shape.
        chunk_size, recompute, experts_backend: see FusedMoE.

    Returns:
        `model`.

    Raises:
        ValueError: if there is no such layer, or one that cannot be patched: another activation than silu, no real
            experts, experts that transformers has sharded (tp_plan) or that are quantised, a router that accelerate
            offloads, a module that fully_shard has changed or whose forward something else has replaced; if rows are to
            be freed that something else holds too; or if another argument is not as in FusedMoE. Nothing is changed
            then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(cast(object, recompute), bool):
        raise ValueError(f"recompute must be True or False, got {recompute!r}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LongcatFlashMoE)}
    if not layers:
        raise ValueError(
            f"model must have a LongcatFlashMoE layer, got {type(model).__name__} without one; other mixtures of "
            f'experts use model.set_experts_implementation("{EXPERTS_IMPLEMENTATION}")'
        )
    for name, layer in layers.items():
        check_layer(name, layer, free_unused_weights)
    runners = [make_runner(layer, chunk_size, experts_backend) for layer in layers.values()]
    for layer, runner in zip(layers.values(), runners, strict=True):
        runner.recompute = recompute
        layer.runner = runner.train(layer.training)
        for module in own_modules(layer):
            if type(module) in PATCHED_CLASSES:
                change_class(module, PATCHED_CLASSES[type(module)])
            if free_unused_weights and type(module) is PatchedExperts:
                resize_gate_up(module, module.num_routed_experts)
                change_class(module, TrimmedExperts)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch` in every layer, in place. Other layers do not change.

    Freed rows of gate_up_proj come back as zeros, which transformers never reads.

    Returns:
        `model`.
    """
    for layer in [module for module in model.modules() if type(module) is PatchedMoE]:
        del layer.runner
        for module in list(own_modules(layer)):
            if type(module) is TrimmedExperts:
                change_class(module, PatchedExperts)
                resize_gate_up(module, module.total_experts)
            for original, patched in PATCHED_CLASSES.items():
                if type(module) is patched:
                    change_class(module, original)
    return model


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Gives the module another forward, as torch.nn.utils.parametrize does: it stays the same object, with its
    parameters and hooks. If accelerate's hooks hold the forward of its class, they get the new one."""
    for name in FORWARD_ATTRIBUTES:
        if holds_own_forward(module, name):
            setattr(module, name, MethodType(new.forward, module))
    module.__class__ = new


def holds_own_forward(module: nn.Module, name: str) -> bool:
    return getattr(vars(module).get(name), "__func__", None) is type(module).forward


def own_modules(layer: nn.Module) -> Iterator[Any]:
    """The layer, its router and its experts, which PEFT may have wrapped or copied."""
    for module in layer.modules():
        if isinstance(module, (LongcatFlashMoE, LongcatFlashTopkRouter, LongcatFlashExperts)):
            yield module


def experts_of(layer: nn.Module) -> Any:
    """The layer's experts without what wraps them."""
    return next(module for module in layer.modules() if isinstance(module, LongcatFlashExperts))


class PatchedRouter(LongcatFlashTopkRouter):  # type: ignore[misc]
    """transformers' router without its choice, which the layer's runner makes from the logits."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [..., H] -> router_logits [T, N], float32 (float64 for float64), which transformers records
        first of all outputs, and the selection bias [N]."""
        check_classifier(self)
        rows = hidden_states.reshape(-1, self.hidden_dim)
        return float32_linear(rows, self.classifier.weight), self.e_score_correction_bias


class PatchedExperts(LongcatFlashExperts):  # type: ignore[misc]
    """transformers' experts, run by the layer's runner. The weights are read inside this call, where PEFT has added its
    adapters, FSDP has gathered the weights and accelerate has loaded them."""

    def forward(self, hidden_states: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """The layer's output [T, H] from hidden_states [T, H].

        Args:
            hidden_states: the tokens.
            run: the runner, called as run(hidden_states, weights=...). It holds the router's logits,
                because FSDP's mixed precision rounds tensor arguments.
        """
        rows, w13_weight, w2_weight = in_one_dtype(
            hidden_states, self.gate_up_proj[: self.num_routed_experts], self.down_proj
        )
        return run(rows, weights=ExpertWeights(w13_weight, w2_weight)).to(hidden_states.dtype)


class TrimmedExperts(PatchedExperts):
    """PatchedExperts without gate_up_proj's rows for zero experts. State dicts have them."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + "gate_up_proj"
        destination[name] = with_rows(destination[name], self.total_experts)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        name = prefix + "gate_up_proj"
        if name in state_dict and state_dict[name].size(0) == self.total_experts:
            state_dict[name] = state_dict[name][: self.num_routed_experts]
        super()._load_from_state_dict(state_dict, prefix, *others)


class PatchedMoE(LongcatFlashMoE):  # type: ignore[misc]
    """transformers' layer with its weights, run by `runner`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> [..., H]."""
        router_logits, bias = self.router(hidden_states)
        # The bias is transformers' buffer, which moves and is loaded with the model; the runner refers to it. Set as an
        # attribute, an nn.Buffer would enter the state dict a second time.
        self.runner.router._buffers["e_score_correction_bias"] = bias
        rows = hidden_states.reshape(-1, hidden_states.size(-1))
        out: Tensor = self.experts(rows, partial(self.runner, router_logits=router_logits))
        return out.view(hidden_states.shape)


#: transformers' classes and what `patch` makes of them.
PATCHED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    LongcatFlashMoE: PatchedMoE,
    LongcatFlashTopkRouter: PatchedRouter,
    LongcatFlashExperts: PatchedExperts,
}


def check_classifier(router: Any) -> None:
    """Raises ValueError if accelerate offloads the classifier: transformers reads its weight without loading it, and
    routes by whatever memory holds."""
    if router.classifier.weight.is_meta and hasattr(router.classifier, "_hf_hook"):
        raise ValueError(
            "mlp.router must be on a device, got a classifier that accelerate offloads: offload mlp.experts alone"
        )


def with_rows(weight: Tensor, count: int) -> Tensor:
    """A copy of `weight` with `count` first rows, of which new ones are zero."""
    resized = weight.new_zeros(count, *weight.shape[1:])
    kept = min(count, weight.size(0))
    resized[:kept] = weight[:kept]
    return resized


def resize_gate_up(experts: nn.Module, count: int) -> None:
    """Gives the parameter gate_up_proj `count` rows. It stays the same object, as when a module moves."""
    weight = experts.get_parameter("gate_up_proj")
    weight.grad = None
    weight.data = with_rows(weight.detach(), count)


def check_layer(name: str, layer: Any, free_unused_weights: bool) -> None:
    """Raises ValueError unless `patch` can patch the layer called `name`."""
    require_silu(layer.config)
    if not any(isinstance(module, LongcatFlashExperts) for module in layer.modules()):
        raise ValueError(
            f"layer {name!r} must have experts that are not quantised, got {type(layer.experts).__name__}: load float8 "
            "checkpoints into zexpert.models.LongcatFlashMoE"
        )
    experts = experts_of(layer)
    if experts.num_routed_experts < 1:
        raise ValueError(f"n_routed_experts must be at least 1, got {experts.num_routed_experts} in layer {name!r}")
    weight = getattr(experts, "gate_up_proj", None)
    is_sharded = hasattr(weight, "device_mesh")
    check_classifier(layer.router)
    for module in own_modules(layer):
        if hasattr(module, "set_reshard_after_forward"):
            raise ValueError(
                f"layer {name!r} must be patched before fully_shard shards its modules, got a {type(module).__name__}"
            )
        if "forward" in vars(module) and not any(
            holds_own_forward(module, attribute) for attribute in FORWARD_ATTRIBUTES
        ):
            if is_sharded:
                raise ValueError(
                    f"layer {name!r} must have whole experts, got experts that transformers shards (tp_plan or "
                    "distributed_config): load the model without, or leave it unpatched"
                )
            raise ValueError(
                f"layer {name!r} must have its own forward, got one that something else put in its place: patch the "
                "model before that"
            )
    rows = (experts.num_routed_experts, experts.total_experts)
    sizes = [2 * experts.intermediate_size, experts.hidden_size]
    if not isinstance(weight, Tensor) or weight.size(0) not in rows or list(weight.shape[1:]) != sizes:
        shape = list(weight.shape) if isinstance(weight, Tensor) else "none"
        raise ValueError(
            f"gate_up_proj of layer {name!r} must be whole, with shape [{rows[0]} or {rows[1]}, {sizes[0]}, "
            f"{sizes[1]}], got {shape}"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"gate_up_proj of layer {name!r} must not be quantised, got {weight.dtype}")
    if free_unused_weights and weight.size(0) != rows[0]:
        holder = weight_holder(layer, weight)
        if holder is not None:
            raise ValueError(
                f"free_unused_weights must be False for layer {name!r}, got True, but {holder} has all rows of "
                "gate_up_proj: free them before that"
            )


def weight_holder(layer: Any, weight: Tensor) -> str | None:
    """What else than the layer has the rows of the weight, if anything."""
    if hasattr(weight, "device_mesh"):
        return "fully_shard"
    if weight.is_meta:
        return "accelerate's offloading" if hasattr(experts_of(layer), "_hf_hook") else None
    return None if isinstance(layer.experts, LongcatFlashExperts) else type(layer.experts).__name__


def make_runner(layer: Any, chunk_size: int | None, experts_backend: str) -> MoERunner:
    """The runner of one layer. Its router has transformers' bias, which is not in the runner's state dict."""
    experts, bias = experts_of(layer), layer.router.e_score_correction_bias
    router = create_fused_moe_router(
        layer.router.top_k,
        experts.num_routed_experts,
        renormalize=False,
        scoring_func="softmax",
        routed_scaling_factor=layer.router.routed_scaling_factor,
        e_score_correction_bias=bias,
        zero_expert_type="identity" if experts.zero_expert_num else None,
        zero_expert_num=experts.zero_expert_num or None,
        num_logical_experts=experts.num_routed_experts,
    )
    router.register_buffer("e_score_correction_bias", bias, persistent=False)
    backend = create_experts(experts_backend)
    if chunk_size is None:
        return DefaultMoERunner(router, backend)
    return ChunkingMoERunner(router, backend, chunk_size=chunk_size)


def in_one_dtype(hidden_states: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in autocast's dtype if it is on, else in the weights'."""
    dtype = autocast_dtype(w13_weight) or w13_weight.dtype
    return hidden_states.to(dtype), w13_weight.to(dtype), w2_weight.to(dtype)


# ---- Other mixtures of experts --------------------------------------------------------------------------------------


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation "zexpert": out[t] = sum_k top_k_weights[t, k] * FFN_{top_k_index[t, k]}(x[t]).

    Terms are summed in float32, in slot order, and rounded once. The model chooses the experts and their weights.

    Args:
        experts: a module that transformers' use_experts_implementation decorates, with gate_up_proj [E, 2F, H], gate
            rows first, down_proj [E, H, F] and silu.
        hidden_states: x, [T, H].
        top_k_index: [T, K], integers. Under expert parallelism E or more is a slot of another device, which is skipped.
        top_k_weights: [T, K], any floating dtype.

    Returns:
        [T, H], dtype of hidden_states.

    Raises:
        ValueError: if the experts have biases, a norm, no gate or one of their own, another activation, or weights that
            are transposed, interleaved or quantised.
    """
    check_experts(experts)
    rows, w13_weight, w2_weight = in_one_dtype(hidden_states, experts.gate_up_proj, experts.down_proj)
    top_k_index = own_slots(experts, top_k_index)
    return RUNNER.run(rows, top_k_weights, top_k_index, w13_weight, w2_weight).to(hidden_states.dtype)


def own_slots(experts: Any, top_k_index: Tensor) -> Tensor:
    """top_k_index with -1 for the slots of another device."""
    if getattr(experts, "_is_expert_parallel", True):  # versions before 5.18 do not say
        return torch.where(top_k_index < experts.gate_up_proj.size(0), top_k_index, -1)
    return top_k_index


def fp8_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """experts_forward for the experts of a fine-grained-fp8 model, transformers' FP8Experts: float8_e4m3fn weights with
    a scale for each block of 128 x 128.

    Hidden states and activations are not quantised, so results are closer to the weights' values than transformers'.
    The weights have no gradients.

    Raises:
        ValueError: if the experts have scales of other blocks or dtypes, an intermediate size that is no multiple of
            128, float4 weights, no gate, another gate than silu(gate) * up, or biases.
    """
    check_fp8_experts(experts)
    return RUNNER.run(
        hidden_states,
        top_k_weights,
        own_slots(experts, top_k_index),
        experts.gate_up_proj.detach(),
        experts.down_proj.detach(),
        experts.gate_up_proj_scale_inv.detach(),
        experts.down_proj_scale_inv.detach(),
    )


def check_fp8_experts(experts: Any) -> None:
    """Raises ValueError unless fp8_experts_forward computes what the experts do."""
    subject = f'experts_implementation "{EXPERTS_IMPLEMENTATION}" must have experts with'
    name = type(experts).__name__
    block_size = None if experts.block_size is None else tuple(experts.block_size)
    expected = {"block_size": (SCALE_BLOCK, SCALE_BLOCK), "has_gate": True, "has_bias": False}
    given = {"block_size": block_size, "has_gate": experts.has_gate, "has_bias": experts.has_bias}
    for gate in ("swiglu_alpha", "swiglu_limit", "gate_softcap", "up_softcap", "limit"):
        expected[gate], given[gate] = None, getattr(experts, gate, None)
    for attribute, wanted in expected.items():
        if given[attribute] != wanted:
            raise ValueError(f"{subject} {attribute}={wanted}, got {given[attribute]} of {name}")
    if not isinstance(experts.act_fn, SILU_MODULES):
        raise ValueError(f"{subject} silu, got {type(experts.act_fn).__name__} of {name}")
    for weight, dtype in (("gate_up_proj", torch.float8_e4m3fn), ("gate_up_proj_scale_inv", torch.float32)):
        if getattr(experts, weight).dtype != dtype:
            raise ValueError(f"{subject} {weight} of {dtype}, got {getattr(experts, weight).dtype} of {name}")
    if experts.intermediate_dim % SCALE_BLOCK != 0:
        raise ValueError(
            f"{subject} an intermediate size that is a multiple of {SCALE_BLOCK}, so that gate and up share no scale, "
            f"got {experts.intermediate_dim} of {name}"
        )


def check_experts(experts: Any) -> None:
    """Raises ValueError unless the experts are gated by silu and nothing else, with weights that need no scale."""
    name = type(experts).__name__
    for attribute, wanted in (
        ("has_gate", True),
        ("is_concatenated", True),
        ("is_transposed", False),
        ("has_bias", False),
        ("has_post_expert_norm", False),
    ):
        value = getattr(experts, attribute, wanted)
        if value != wanted:
            raise ValueError(
                f'experts_implementation "{EXPERTS_IMPLEMENTATION}" must have experts with {attribute}={wanted}, '
                f"got {value} of {name}"
            )
    for weight in (experts.gate_up_proj, experts.down_proj):
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(
                f'experts_implementation "{EXPERTS_IMPLEMENTATION}" must have experts that are not quantised, got '
                f"{weight.dtype} of {name}"
            )
    if experts._apply_gate.__func__.__module__ != ALL_EXPERTS_FUNCTIONS.__class__.__module__:
        raise ValueError(
            f'experts_implementation "{EXPERTS_IMPLEMENTATION}" must have experts with the usual gate, '
            f"act(gate) * up, got one of {name}'s own"
        )
    activation = experts.act_fn
    if not isinstance(activation, SILU_MODULES) and activation is not nn.functional.silu:
        given = getattr(activation, "__name__", type(activation).__name__)
        raise ValueError(
            f'experts_implementation "{EXPERTS_IMPLEMENTATION}" must have experts with silu, got {given} of {name}'
        )


def warn_of_longcat(choose: Callable[[Any, str | None], str]) -> Callable[[Any, str | None], str]:
    """transformers' choice of an experts implementation, with a warning for LongCat-Flash, whose experts ignore it."""

    @wraps(choose)
    def choose_and_warn(model: Any, requested_experts: str | None) -> str:
        if requested_experts == EXPERTS_IMPLEMENTATION:
            warnings.warn(
                f'experts_implementation "{EXPERTS_IMPLEMENTATION}" has no effect on LongCat-Flash: call '
                "zexpert.integrations.transformers.patch(model)",
                stacklevel=4,
            )
        return choose(model, requested_experts)

    return choose_and_warn


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
if ALL_FP8_EXPERTS_FUNCTIONS is not None:
    ALL_FP8_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, fp8_experts_forward)
LongcatFlashPreTrainedModel.get_correct_experts_implementation = warn_of_longcat(
    LongcatFlashPreTrainedModel.get_correct_experts_implementation
)
