# SPDX-License-Identifier: Apache-2.0
"""zexpert in vLLM: one kernel routes zero experts, and no matrix product computes their slots.

vLLM calls `zexpert_plugins.vllm` in every process through the entry point "vllm.general_plugins". It does nothing
unless the environment has ZEXPERT_VLLM=1 (or true, yes, on); then it calls `register`. For models with zero experts
(LongCat-Flash):

- LongcatRouter gets its float32 logits from router_logits.
- ZeroExpertRouter gets its weights, ids and zero experts' output from biased_topk and zero_expert_accumulate. vLLM's
  contract holds: a slot that chose a zero expert has weight 0, and `zero_expert_output` is there once.
- Its RoutedExperts run zexpert's experts if vLLM keeps plain weights for its Triton kernels (`--moe-backend triton`)
  and there is no expert parallelism. Slots of zero experts then have id -1 from the router on: the expert load balancer
  neither counts nor maps them, and no expert computes them. DeepEP's dispatch accepts -1 too. vLLM's other kernels do
  not; for them the id is 0.
- Captured routed experts (`enable_return_routed_experts`) are the choices among all experts, zero experts by their own
  number and -1 for an empty slot, so that zexpert.replay_choices can repeat them.
- zero_experts_compute_triton is replaced. Its grid in vLLM 0.32 counts hidden_size // 256 blocks, so the last
  hidden_size % 256 channels of a token stay zero.

vLLM's log gets one line per process, and one per kind of layer that says who computes its experts.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zexpert._version import __version__
from zexpert.integrations.engine_router import engine_router_logits
from zexpert.integrations.given_routing import RUNNER
from zexpert.ops import biased_topk, biased_topk_choices, zero_expert_accumulate

TESTED_VERSIONS = ("0.32.0",)

_LAYERS = "vllm.model_executor.layers.fused_moe"

#: What zexpert replaces or reads: module, class, method and names of its arguments. Others may follow.
_SEAMS = (
    ("router.zero_expert_router", "ZeroExpertRouter", "__init__", "top_k e_score_correction_bias num_logical_experts "
     "zero_expert_type scoring_func renormalize routed_scaling_factor"),
    ("router.zero_expert_router", "ZeroExpertRouter", "_compute_routing", "hidden_states router_logits indices_type"),
    ("router.zero_expert_router", "ZeroExpertRouter", "set_capture_fn", "capture_fn"),
    ("routed_experts", "RoutedExperts", "forward_modular", "x topk_weights topk_ids shared_experts "
     "shared_experts_input"),
    ("runner.moe_runner", "MoERunner", "__init__", "layer_name router routed_experts"),
    ("runner.moe_runner", "MoERunner", "_maybe_add_zero_expert_output", "result"),
    ("fused_moe", None, "zero_experts_compute_triton", "expert_indices expert_scales num_experts zero_expert_type "
     "hidden_states"),
    ("routed_experts_capturer", None, "_get_routed_experts_shape", "vllm_config"),
    ("activation", "MoEActivation", "SILU", ""),
    ("oracle.unquantized", "UnquantizedMoeBackend", "TRITON", ""),
)  # fmt: skip

LOG = logging.getLogger("vllm.zexpert")  # vLLM's handlers are those of the logger "vllm"
_logged: set[str] = set()


def register() -> None:
    """Makes this process's vLLM use zexpert. Further calls do nothing.

    Raises:
        RuntimeError: if vLLM lacks what zexpert replaces, or has it with other arguments. Nothing is changed then.
    """
    import vllm

    _check_seams(vllm.__version__)
    capturer, fused_moe, zero_expert_router = (
        import_module(f"{_LAYERS}.{name}")
        for name in ("routed_experts_capturer", "fused_moe", "router.zero_expert_router")
    )
    for module in (fused_moe, zero_expert_router):
        module.zero_experts_compute_triton = zero_experts_compute  # type: ignore[attr-defined]
    router = zero_expert_router.ZeroExpertRouter
    router._compute_routing = _compute_routing
    _replace(router, "set_capture_fn", _set_capture_fn)
    _replace(import_module(f"{_LAYERS}.routed_experts").RoutedExperts, "forward_modular", _forward_modular)
    init_runner = functools.partial(_init_runner, router_class=router)
    _replace(import_module(f"{_LAYERS}.runner.moe_runner").MoERunner, "__init__", init_runner)
    longcat = import_module("vllm.model_executor.models.longcat_flash")
    _replace(longcat.LongcatRouter, "forward", _router_forward)
    _replace(capturer, "_get_routed_experts_shape", _get_routed_experts_shape)
    _log_process()


def _tested() -> str:
    return ", ".join(TESTED_VERSIONS)


def _log_once(message: str) -> None:
    """A line in vLLM's log, unless it is there."""
    if LOG.isEnabledFor(logging.INFO) and message not in _logged:
        _logged.add(message)
        LOG.info(message)


def _log_process() -> None:
    """The line of this process. Some processes set up their log after they called register."""
    import vllm

    _log_once(f"zexpert {__version__} routes zero experts of vLLM {vllm.__version__} (tested with {_tested()})")


def _check_seams(version: str) -> None:
    """Raises RuntimeError unless vLLM has everything of _SEAMS."""
    for module, owner, name, arguments in _SEAMS:
        place = ".".join(part for part in (module, owner, name) if part)
        cause: Exception | None = None
        try:
            found = import_module(f"{_LAYERS}.{module}")
            if owner is not None:
                found = getattr(found, owner)
            found = getattr(found, name)
            known = inspect.signature(found).parameters if arguments else {}
            missing = [argument for argument in arguments.split() if argument not in known]
        except (ImportError, AttributeError) as error:
            cause = error
            problem = f"has no {place}"
        else:
            if not missing:
                continue
            problem = f"has a {place} without {missing[0]}"
        raise RuntimeError(
            f"zexpert {__version__} must run in a vLLM like {_tested()}, got vLLM {version}, which {problem}: "
            "unset ZEXPERT_VLLM to run without zexpert"
        ) from cause


def _replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Makes owner.name(...) call replacement(original, ...), once."""
    original = getattr(owner, name)
    if hasattr(original, "_replaced_by_zexpert"):
        return

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    method._replaced_by_zexpert = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _init_runner(
    original: Callable[..., None],
    self: Any,
    *args: Any,
    router_class: type,
    **kwargs: Any,
) -> None:
    original(self, *args, **kwargs)
    router, experts = self.router, self.routed_experts
    if isinstance(router, router_class):
        router._zexpert_routed_experts = experts  # type: ignore[attr-defined]
        experts._zexpert_has_zero_experts = True
        count = router.e_score_correction_bias.numel() - router.num_logical_experts  # type: ignore[attr-defined]
        layers = f"layers with {router.num_logical_experts} experts and {count} zero experts"  # type: ignore[attr-defined]
        obstacle = _obstacle(experts)
        _log_process()
        if obstacle is None:
            _log_once(f"zexpert: routing and experts of {layers}")
        else:
            _log_once(f"zexpert: routing only of {layers}; vLLM computes the experts, because {obstacle}")


def _set_capture_fn(original: Callable[..., None], self: Any, capture_fn: Callable[[Tensor], None] | None) -> None:
    """ZeroExpertRouter.set_capture_fn: _compute_routing calls it, with the choices among all experts."""
    self._zexpert_capture_fn = capture_fn
    original(self, None)


def _get_routed_experts_shape(original: Callable[..., tuple[int, int, int]], vllm_config: Any) -> tuple[int, int, int]:
    """Layers, experts and experts per token of captured routing; zero experts count, so that the type holds them."""
    num_layers, num_experts, top_k = original(vllm_config)
    zero_experts = getattr(vllm_config.model_config.hf_text_config, "zero_expert_num", None) or 0
    return num_layers, num_experts + zero_experts, top_k


def _router_forward(original: Callable[..., Tensor], self: Any, hidden_states: Tensor) -> Tensor:
    """LongcatRouter.forward: [T, H] -> logits [T, N]."""
    logits = engine_router_logits(self.classifier, hidden_states)
    return original(self, hidden_states) if logits is None else logits


def _compute_routing(
    self: Any,
    hidden_states: Tensor,
    router_logits: Tensor,
    indices_type: torch.dtype | None,
    *,
    input_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ZeroExpertRouter._compute_routing: topk_weights [T, K] float32 and topk_ids [T, K]."""
    routing_arguments: dict[str, Any] = {
        "num_real_experts": self.num_logical_experts,
        "num_identity_experts": None if self.zero_expert_type == "identity" else 0,
        "scoring_func": self.scoring_func,
        "renormalize": self.renormalize,
        "routed_scaling_factor": self.routed_scaling_factor,
    }
    bias = self.e_score_correction_bias.data
    choices: Tensor | None = None
    capture_fn = getattr(self, "_zexpert_capture_fn", None)
    if capture_fn is not None:
        choices = biased_topk_choices(router_logits, bias, self.top_k, **routing_arguments)
        capture_fn(choices)
    routing = biased_topk(
        router_logits,
        bias,
        self.top_k,
        **routing_arguments,
        indices_dtype=torch.int64 if indices_type == torch.int64 else torch.int32,
        choices=choices,
    )
    self._zero_expert_output = zero_expert_accumulate(hidden_states, routing.zero_weight)
    experts = getattr(self, "_zexpert_routed_experts", None)
    accepts_no_expert = experts is not None and (_obstacle(experts) is None or _dispatch_accepts_no_expert(experts))
    return routing.topk_weights, routing.topk_ids if accepts_no_expert else routing.topk_ids.clamp_min(0)


def _dispatch_accepts_no_expert(experts: Any) -> bool:
    """True if DeepEP dispatches the tokens: it sends nothing for id -1, and vLLM replaces the id where it arrives."""
    kernel = getattr(experts.quant_method, "moe_kernel", None)
    dispatch = getattr(kernel, "prepare_finalize", None)
    name = type(dispatch).__name__
    # The other one looks ids up in a table if it has one.
    return name == "DeepEPHTPrepareAndFinalize" or (
        name == "DeepEPLLPrepareAndFinalize" and getattr(dispatch, "global_to_physical", None) is None
    )


def _obstacle(experts: Any) -> str | None:
    """Why zexpert's experts do not compute these RoutedExperts; None if they do: a layer with zero experts, SwiGLU
    without extras, unquantized weights in vLLM's own layout, all experts on this rank. With tensor parallelism each may
    be a slice."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    backend = getattr(experts.quant_method, "unquantized_backend", None)
    extras = (experts.swiglu_limit, experts.swiglu_alpha, experts.swiglu_beta)
    obstacles = (
        (not getattr(experts, "_zexpert_has_zero_experts", False), "they are no zero experts' layer"),
        (backend is None, f"the weights are for {type(experts.quant_method).__name__}"),
        (backend != UnquantizedMoeBackend.TRITON, f"the backend is {getattr(backend, 'value', backend)}, not TRITON"),
        (experts.activation != MoEActivation.SILU, "the activation is not silu"),
        (experts.expert_map is not None, "experts are parallel"),
        (experts.moe_config.moe_parallel_config.use_all2all_kernels, "tokens are dispatched"),
        (experts.apply_router_weight_on_input, "weights apply to the input"),
        (experts.moe_config.has_bias, "the experts have biases"),
        (extras != (None, None, None), "SwiGLU has a limit"),
    )
    return next((text for found, text in obstacles if found), None)


def _forward_modular(
    original: Callable[..., Any],
    self: Any,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_experts: Any = None,
    shared_experts_input: Tensor | None = None,
) -> Any:
    """RoutedExperts.forward_modular: the weighted sum [T, H] over the slots with id >= 0."""
    if _obstacle(self) is not None:
        return original(self, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
    if shared_experts is not None:
        from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

        shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
    return RUNNER.run(x, topk_weights, topk_ids, self.w13_weight, self.w2_weight)


def zero_experts_compute(
    expert_indices: Tensor,
    expert_scales: Tensor,
    num_experts: int,
    zero_expert_type: str,
    hidden_states: Tensor,
) -> Tensor:
    """Replaces vLLM's zero_experts_compute_triton, for every hidden size: the identity experts' output [T, H].

    Args:
        expert_indices: [T, K]; those of zero experts, num_experts and above, become 0.
        expert_scales: [T, K]; the weights of zero experts become 0.
        num_experts: real experts.
        zero_expert_type: "identity".
        hidden_states: [T, H].

    Raises:
        ValueError: for another zero_expert_type.
    """
    if zero_expert_type != "identity":
        raise ValueError(f'zero_expert_type must be "identity", got {zero_expert_type!r}')
    is_zero_expert = expert_indices >= num_experts
    zero_weight = torch.where(is_zero_expert, expert_scales, 0.0).sum(dim=-1, dtype=torch.float32)
    expert_indices.masked_fill_(is_zero_expert, 0)
    expert_scales.masked_fill_(is_zero_expert, 0.0)
    return zero_expert_accumulate(hidden_states, zero_weight)
