# SPDX-License-Identifier: Apache-2.0
"""zexpert in Hugging Face transformers (version 5).

LongCat-Flash: `patch(model)` makes every LongcatFlashMoE of a loaded model run on zexpert, and `unpatch(model)` gives
them back. Other mixtures of experts: importing this module registers the experts implementation "zexpert", for
`from_pretrained(..., experts_implementation="zexpert")` and `model.set_experts_implementation("zexpert")`.

Importing it needs transformers, the extra `zexpert[transformers]`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from zexpert._autocast import autocast_dtype, full_precision_linear
from zexpert.experts.factory import create_experts
from zexpert.integrations.given_routing import RUNNER
from zexpert.models.config import require_silu
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
        LongcatFlashTopkRouter,
    )
except ImportError as error:
    raise ImportError(
        f"zexpert.integrations.transformers needs transformers 5 ({error}): pip install 'zexpert[transformers]'"
    ) from error

#: What transformers knows zexpert's experts by.
EXPERTS_IMPLEMENTATION = "zexpert"

#: Where accelerate, which spreads a model over devices, puts a forward of its own and keeps the one before.
FORWARD_ATTRIBUTES = ("forward", "_old_forward")

#: The modules that "silu" and "swish" are there.
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

    Parameters and buffers stay the objects they are, under their names: optimisers, state dicts, save_pretrained and
    recorded router logits go on as before. Each layer gets a submodule `runner` without weights, a zexpert MoERunner,
    so zexpert.telemetry and the bias controllers of zexpert.training work on the model. Results differ from
    transformers' by rounding: terms are summed in float32 and rounded once, and under autocast the router stays in
    float32. Layers that are patched already are patched anew.

    Args:
        model: a LongCat-Flash model of transformers, or any module that holds LongcatFlashMoE layers.
        free_unused_weights: give back the memory of gate_up_proj's rows for zero experts, zero_expert_num of
            n_routed_experts + zero_expert_num, which transformers allocates and never reads. The parameter keeps its
            identity and loses its gradient; state dicts have the rows, as zeros, all the same. Free them before an
            optimiser takes its first step, whose state has the parameter's shape.
        chunk_size, recompute, experts_backend: see FusedMoE.

    Returns:
        `model`.

    Raises:
        ValueError: if there is no such layer, or one that cannot be patched: another activation than silu, no real
            experts, experts that are sharded or quantised, or a forward that something else has replaced; or if another
            argument is not as FusedMoE takes it. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(cast(object, recompute), bool):
        raise ValueError(f"recompute must be True or False, got {recompute!r}")
    layers = {name: module for name, module in model.named_modules() if type(module) in (LongcatFlashMoE, PatchedMoE)}
    if not layers:
        raise ValueError(
            f"model must have a LongcatFlashMoE layer, got {type(model).__name__} without one; other mixtures of "
            f'experts take model.set_experts_implementation("{EXPERTS_IMPLEMENTATION}")'
        )
    for name, layer in layers.items():
        check_layer(name, layer)
    runners = [make_runner(layer, chunk_size, experts_backend) for layer in layers.values()]
    for layer, runner in zip(layers.values(), runners, strict=True):
        runner.recompute = recompute
        layer.runner = runner.train(layer.training)
        change_class(layer, PatchedMoE)
        change_class(layer.router, PatchedRouter)
        if free_unused_weights and type(layer.experts) is LongcatFlashExperts:
            resize_gate_up(layer.experts, layer.experts.num_routed_experts)
            layer.experts.__class__ = TrimmedExperts
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Gives every layer that `patch` changed back to transformers, in place; other layers are left alone.

    Freed rows of gate_up_proj come back as zeros, which transformers never reads.

    Returns:
        `model`.
    """
    for layer in [module for module in model.modules() if type(module) is PatchedMoE]:
        del layer.runner
        change_class(layer, LongcatFlashMoE)
        change_class(layer.router, LongcatFlashTopkRouter)
        if type(layer.experts) is TrimmedExperts:
            layer.experts.__class__ = LongcatFlashExperts
            resize_gate_up(layer.experts, layer.experts.total_experts)
    return model


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Gives the module another forward, as torch.nn.utils.parametrize does: it stays the same object, with its
    parameters and hooks. Where accelerate's hooks hold the forward of its class, they hold the new one then."""
    for name in FORWARD_ATTRIBUTES:
        if holds_own_forward(module, name):
            setattr(module, name, MethodType(new.forward, module))
    module.__class__ = new


def holds_own_forward(module: nn.Module, name: str) -> bool:
    return getattr(vars(module).get(name), "__func__", None) is type(module).forward


class PatchedRouter(LongcatFlashTopkRouter):  # type: ignore[misc]
    """transformers' router without its choice, which the layer's runner makes from the logits."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        """hidden_states [..., H] -> router_logits [T, N], float32, where transformers records them."""
        rows = hidden_states.reshape(-1, self.hidden_dim).float()
        return (full_precision_linear(rows, self.classifier.weight.float()),)


class PatchedMoE(LongcatFlashMoE):  # type: ignore[misc]
    """transformers' layer with its weights, run by `runner`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> [..., H]."""
        (router_logits,) = self.router(hidden_states)
        # The bias is transformers' buffer, which moves and is loaded with the model; the runner refers to it. Set as an
        # attribute, an nn.Buffer would enter the state dict a second time.
        self.runner.router._buffers["e_score_correction_bias"] = self.router.e_score_correction_bias
        experts = self.experts
        rows, w13_weight, w2_weight = in_one_dtype(
            hidden_states.reshape(-1, hidden_states.size(-1)),
            experts.gate_up_proj[: experts.num_routed_experts],
            experts.down_proj,
        )
        out: Tensor = self.runner(rows, router_logits, w13_weight, w2_weight)
        return out.view(hidden_states.shape).to(hidden_states.dtype)


class TrimmedExperts(LongcatFlashExperts):  # type: ignore[misc]
    """transformers' experts without gate_up_proj's rows for zero experts, whose state dict has them."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + "gate_up_proj"
        destination[name] = with_rows(destination[name], self.total_experts)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        name = prefix + "gate_up_proj"
        if name in state_dict and state_dict[name].size(0) == self.total_experts:
            state_dict[name] = state_dict[name][: self.num_routed_experts]
        super()._load_from_state_dict(state_dict, prefix, *others)


def with_rows(weight: Tensor, count: int) -> Tensor:
    """`weight` with `count` first rows, of which new ones are zero; memory of its own."""
    resized = weight.new_zeros(count, *weight.shape[1:])
    kept = min(count, weight.size(0))
    resized[:kept] = weight[:kept]
    return resized


def resize_gate_up(experts: nn.Module, count: int) -> None:
    """Gives the parameter gate_up_proj `count` rows. It stays the same object, as when a module moves."""
    weight = experts.get_parameter("gate_up_proj")
    weight.grad = None
    weight.data = with_rows(weight.detach(), count)


def check_layer(name: str, layer: Any) -> None:
    """Raises ValueError unless the layer called `name` is one that zexpert computes."""
    require_silu(layer.config)
    experts = layer.experts
    if experts.num_routed_experts < 1:
        raise ValueError(f"n_routed_experts must be at least 1, got {experts.num_routed_experts} in layer {name!r}")
    for module in (layer, layer.router, experts):
        if "forward" in vars(module) and not any(
            holds_own_forward(module, attribute) for attribute in FORWARD_ATTRIBUTES
        ):
            raise ValueError(
                f"layer {name!r} must have its own forward, got one that something else put in its place: patch the "
                "model before that"
            )
    rows = (experts.num_routed_experts, experts.total_experts)
    sizes = [2 * experts.intermediate_size, experts.hidden_size]
    weight = getattr(experts, "gate_up_proj", None)
    if not isinstance(weight, Tensor) or weight.size(0) not in rows or list(weight.shape[1:]) != sizes:
        shape = list(weight.shape) if isinstance(weight, Tensor) else "none"
        raise ValueError(
            f"gate_up_proj of layer {name!r} must be whole, with shape [{rows[0]} or {rows[1]}, {sizes[0]}, "
            f"{sizes[1]}], got {shape}"
        )
    if weight.is_meta and hasattr(experts, "_hf_hook"):
        raise ValueError(f"gate_up_proj of layer {name!r} must be on a device, got one that accelerate offloads")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"gate_up_proj of layer {name!r} must not be quantised, got {weight.dtype}")


def make_runner(layer: Any, chunk_size: int | None, experts_backend: str) -> MoERunner:
    """The runner of one layer. Its router has transformers' bias, which is no part of the runner's state dict."""
    experts, bias = layer.experts, layer.router.e_score_correction_bias
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
    """All in autocast's dtype, where it is on, else in the weights'."""
    dtype = autocast_dtype(w13_weight) or w13_weight.dtype
    return hidden_states.to(dtype), w13_weight.to(dtype), w2_weight.to(dtype)


# ---- Other mixtures of experts --------------------------------------------------------------------------------------


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation "zexpert": out[t] = sum_k top_k_weights[t, k] * FFN_{top_k_index[t, k]}(x[t]).

    Terms are summed in float32, in slot order, and rounded once. Which experts a token has, and with which weights, is
    the model's.

    Args:
        experts: a module that transformers' use_experts_implementation decorates, with gate_up_proj [E, 2F, H], gate
            rows first, down_proj [E, H, F] and silu.
        hidden_states: x, [T, H].
        top_k_index: [T, K], integers; E or more for a slot of another device under expert parallelism, which is left
            out.
        top_k_weights: [T, K], any floating dtype.

    Returns:
        [T, H], dtype of hidden_states.

    Raises:
        ValueError: if the experts have biases, a norm, no gate or one of their own, transposed or interleaved weights,
            or another activation.
    """
    check_experts(experts)
    rows, w13_weight, w2_weight = in_one_dtype(hidden_states, experts.gate_up_proj, experts.down_proj)
    if getattr(experts, "_is_expert_parallel", True):  # versions before 5.18 do not say
        top_k_index = torch.where(top_k_index < w13_weight.size(0), top_k_index, -1)
    return RUNNER.run(rows, top_k_weights, top_k_index, w13_weight, w2_weight).to(hidden_states.dtype)


def check_experts(experts: Any) -> None:
    """Raises ValueError unless the experts are gated by silu and nothing else."""
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
    if experts._apply_gate.__func__.__module__ != ALL_EXPERTS_FUNCTIONS.__class__.__module__:
        raise ValueError(
            f'experts_implementation "{EXPERTS_IMPLEMENTATION}" must have experts with the usual gate, '
            f"act(gate) * up, got one of {name}'s own"
        )
    if not isinstance(experts.act_fn, SILU_MODULES):
        raise ValueError(
            f'experts_implementation "{EXPERTS_IMPLEMENTATION}" must have experts with silu, got '
            f"{type(experts.act_fn).__name__} of {name}"
        )


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
