# SPDX-License-Identifier: Apache-2.0
"""zexpert inside vLLM: its contract with zexpert's routing and experts. Run by `make test-vllm`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from torch import Tensor, nn
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, fused_moe
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer
from vllm.model_executor.layers.fused_moe.router import base_router, zero_expert_router
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

import reference
import zexpert
from testing import assert_error_rule
from zexpert.integrations import vllm as plugin
from zexpert.integrations.vllm import register, zero_experts_compute
from zexpert.ops import biased_topk_choices, router_logits

NUM_EXPERTS, NUM_ZERO_EXPERTS, TOP_K = 6, 3, 4
BIAS = 0.1 * torch.randn(NUM_EXPERTS + NUM_ZERO_EXPERTS, generator=torch.Generator().manual_seed(0))


def make_router(**arguments: Any) -> ZeroExpertRouter:
    return create_fused_moe_router(
        top_k=TOP_K,
        global_num_experts=NUM_EXPERTS,
        num_logical_experts=NUM_EXPERTS,
        e_score_correction_bias=nn.Parameter(BIAS.clone()),
        **{"zero_expert_type": "identity", "renormalize": False, "routed_scaling_factor": 6.0, **arguments},
    )


def make_inputs(num_tokens: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    return hidden_states, torch.randn(num_tokens, NUM_EXPERTS + NUM_ZERO_EXPERTS, generator=generator)


def try_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def run_python(code: str, **environment: str) -> str:
    done = try_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


PRINT_ROUTER = (
    "from vllm.plugins import load_general_plugins; load_general_plugins(); load_general_plugins()\n"
    "from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter as Router\n"
    "print(Router._compute_routing.__module__)"
)


@pytest.mark.parametrize("switch", ["1", "true", "YES", "on"])
def test_entry_point_when_asked_for(switch: str) -> None:
    done = try_python(f"import logging; logging.basicConfig(level=logging.INFO)\n{PRINT_ROUTER}", ZEXPERT_VLLM=switch)
    assert done.stdout.splitlines()[-1] == "zexpert.integrations.vllm", done.stderr
    line = f"zexpert {zexpert.__version__} routes zero experts of vLLM {vllm.__version__} (tested with 0.32.0)"
    assert (done.stdout + done.stderr).count(line) == 1


@pytest.mark.parametrize("switch", ["0", "false", "No", "off", ""])
def test_entry_point_is_off_unless_asked_for(switch: str) -> None:
    """Then no process imports zexpert."""
    code = "import sys\n" + PRINT_ROUTER + "\nprint([name for name in sys.modules if name.split('.')[0] == 'zexpert'])"
    *_, router, modules = run_python(code, ZEXPERT_VLLM=switch).splitlines()
    assert router.startswith("vllm.")
    assert modules == "[]"


def test_nonsense_is_refused() -> None:
    done = try_python(PRINT_ROUTER, ZEXPERT_VLLM="maybe")
    assert done.returncode != 0
    message = "ValueError: ZEXPERT_VLLM must be 1, true, yes or on, or 0, false, no or off, got 'maybe'"
    assert done.stderr.splitlines()[-1] == message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("del zero_expert_router.ZeroExpertRouter", "has no router.zero_expert_router.ZeroExpertRouter.__init__"),
        ("del RoutedExperts.forward_modular", "has no routed_experts.RoutedExperts.forward_modular"),
        (
            "RoutedExperts.forward_modular = lambda self, x, topk_weights: x",
            "has a routed_experts.RoutedExperts.forward_modular without topk_ids",
        ),
    ],
)
def test_another_vllm_is_refused(change: str, problem: str) -> None:
    """Never silently without zexpert."""
    code = (
        "from vllm.model_executor.layers.fused_moe.router import zero_expert_router\n"
        "from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts\n"
        f"{change}\nfrom vllm.plugins import load_general_plugins; load_general_plugins()"
    )
    done = try_python(code, ZEXPERT_VLLM="1")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"RuntimeError: zexpert {zexpert.__version__} must run in a vLLM like 0.32.0, got vLLM {vllm.__version__}, "
        f"which {problem}: unset ZEXPERT_VLLM to run without zexpert"
    )


def test_registering_again_changes_nothing() -> None:
    before = RoutedExperts.forward_modular, ZeroExpertRouter._compute_routing
    register()
    assert before == (RoutedExperts.forward_modular, ZeroExpertRouter._compute_routing)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("hidden_size", [200, 257, 512])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_router_keeps_the_contract(num_tokens: int, hidden_size: int, renormalize: bool, scoring_func: str) -> None:
    router = make_router(renormalize=renormalize, scoring_func=scoring_func)
    hidden_states, router_logits = make_inputs(num_tokens, hidden_size)
    topk_weights, topk_ids = router.select_experts(hidden_states, router_logits)

    expected = reference.biased_topk(
        router_logits, BIAS, TOP_K, num_real_experts=NUM_EXPERTS, scoring_func=scoring_func, renormalize=renormalize,
        routed_scaling_factor=6.0,
    )  # fmt: skip
    assert torch.equal(topk_ids, expected.topk_ids.clamp_min(0).int())
    torch.testing.assert_close(topk_weights, expected.topk_weights.float())
    zero_expert_output = router.zero_expert_output
    torch.testing.assert_close(zero_expert_output, expected.zero_weight.float()[:, None] * hidden_states)
    assert router.zero_expert_output is None
    if num_tokens == 7:
        assert (expected.topk_ids < 0).any()


@pytest.mark.usefixtures("vllm_config")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_of_the_router(dtype: torch.dtype) -> None:
    from vllm.model_executor.models.longcat_flash import LongcatRouter

    config = SimpleNamespace(hidden_size=128, n_routed_experts=NUM_EXPERTS)
    hidden_states = torch.randn(5, 128).to(dtype)
    router = LongcatRouter(config, NUM_ZERO_EXPERTS, torch.float32)
    weight = torch.randn(NUM_EXPERTS + NUM_ZERO_EXPERTS, 128)
    router.classifier.weight.data.copy_(weight)
    assert torch.equal(router(hidden_states), router_logits(hidden_states, weight))
    lower = LongcatRouter(config, NUM_ZERO_EXPERTS, torch.bfloat16)
    lower.classifier.weight.data.copy_(weight)
    lower.classifier.quant_method.process_weights_after_loading(lower.classifier)
    assert lower(hidden_states.bfloat16()).dtype == torch.bfloat16  # vLLM's own


@pytest.mark.parametrize("indices_type", [None, torch.int32, torch.int64, torch.uint32])
def test_types_of_ids(indices_type: torch.dtype | None) -> None:
    _, topk_ids = make_router().select_experts(*make_inputs(7, 64), topk_indices_dtype=indices_type)
    assert topk_ids.dtype == (indices_type or torch.int32)
    assert int(topk_ids.long().max()) < NUM_EXPERTS


def test_rows_of_garbage_choose_nothing() -> None:
    router = make_router()
    hidden_states, router_logits = make_inputs(7, 64)
    topk_weights, topk_ids = router.select_experts(hidden_states, router_logits.fill_(torch.nan))
    assert not topk_weights.any()
    assert not topk_ids.any()
    assert not router.zero_expert_output.any()


@pytest.mark.parametrize("hidden_size", [200, 256, 300])
def test_zero_experts_compute(hidden_size: int) -> None:
    for module in (fused_moe, zero_expert_router):
        assert module.zero_experts_compute_triton is zero_experts_compute
    ids = torch.tensor([[0, 7, 5, 8], [1, 2, 3, 4]])
    scales = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    hidden_states = torch.randn(2, hidden_size)
    out = fused_moe.zero_experts_compute_triton(ids, scales, NUM_EXPERTS, "identity", hidden_states)
    torch.testing.assert_close(out, torch.stack([0.6 * hidden_states[0], 0 * hidden_states[1]]))
    assert ids.tolist() == [[0, 0, 5, 0], [1, 2, 3, 4]]
    torch.testing.assert_close(scales, torch.tensor([[0.1, 0.0, 0.3, 0.0], [0.5, 0.6, 0.7, 0.8]]))
    with pytest.raises(ValueError, match=r"^zero_expert_type must be \"identity\", got 'drop'$"):
        zero_experts_compute(ids, scales, NUM_EXPERTS, "drop", hidden_states)


def make_layer(dtype: torch.dtype, name: str) -> Any:
    """A whole MoE layer of vLLM's, with weights in the layout that its Triton kernels take."""
    layer = FusedMoEFactory(
        zero_expert_type="identity", e_score_correction_bias=nn.Parameter(BIAS.clone()), num_experts=NUM_EXPERTS,
        top_k=TOP_K, hidden_size=64, intermediate_size=32, params_dtype=dtype, renormalize=False,
        prefix=f"{name}.experts", routed_scaling_factor=6.0, router_logits_dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    nn.init.normal_(layer.routed_experts.w13_weight, std=0.2)
    nn.init.normal_(layer.routed_experts.w2_weight, std=0.2)
    layer.routed_experts.quant_method.unquantized_backend = UnquantizedMoeBackend.TRITON
    return layer


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 33])
def test_layer(vllm_config: Any, num_tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(dtype, f"model.{num_tokens}.{dtype}")
    hidden_states, router_logits = make_inputs(num_tokens, 64, dtype)
    seen: list[Tensor] = []
    forward_modular = layer.routed_experts.forward_modular

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["topk_ids"])
        return forward_modular(*args, **kwargs)

    layer.routed_experts.forward_modular = spy
    with set_forward_context(None, vllm_config):
        out = layer(hidden_states, router_logits)
    exact, plain = (
        reference.layer(
            hidden_states, router_logits, layer.routed_experts.w13_weight, layer.routed_experts.w2_weight,
            top_k=TOP_K, bias=BIAS, num_real_experts=NUM_EXPERTS, routed_scaling_factor=6.0, dtype=reference_dtype,
        )
        for reference_dtype in (torch.float64, dtype)
    )  # fmt: skip
    assert_error_rule(out, plain, exact)
    (topk_ids,) = seen
    assert (topk_ids == -1).any() or num_tokens == 1  # no slot of a zero expert reached an expert


@torch.inference_mode()
def test_experts_that_are_not_zexperts(vllm_config: Any) -> None:
    """Weights in another layout stay with vLLM's kernels, and so do ids of 0 beside weights of 0."""
    layer = make_layer(torch.float32, "other")
    for attribute, value in (("apply_router_weight_on_input", True), ("swiglu_limit", 7.0)):
        kept = getattr(layer.routed_experts, attribute)
        setattr(layer.routed_experts, attribute, value)
        _, topk_ids = layer.router.select_experts(*make_inputs(7, 64))
        assert int(topk_ids.min()) == 0
        setattr(layer.routed_experts, attribute, kept)
    _, topk_ids = layer.router.select_experts(*make_inputs(7, 64))
    assert int(topk_ids.min()) == -1


@torch.inference_mode()
@pytest.mark.parametrize("runs_zexperts", [True, False])
def test_captured_choices(vllm_config: Any, runs_zexperts: bool) -> None:
    """Zero experts by their own number, whoever computes the experts. The layer's results do not change."""
    layer = make_layer(torch.float32, f"captured.{runs_zexperts}")
    if not runs_zexperts:
        layer.routed_experts.apply_router_weight_on_input = True
    inputs = make_inputs(7, 64)
    before = layer.router.select_experts(*inputs)
    captured: list[Tensor] = []
    layer.router.set_capture_fn(captured.append)
    after = layer.router.select_experts(*inputs)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    (choices,) = captured
    assert torch.equal(choices, biased_topk_choices(inputs[1], BIAS, TOP_K, num_real_experts=NUM_EXPERTS))
    assert int(choices.max()) >= NUM_EXPERTS
    layer.router.set_capture_fn(None)
    layer.router.select_experts(*inputs)
    assert len(captured) == 1


@torch.inference_mode()
def test_captured_choices_in_vllms_buffer_become_a_record(vllm_config: Any) -> None:
    """By vLLM's own capturer, in a type that holds zero experts' numbers, and replayed."""
    model_config = SimpleNamespace(
        get_total_num_hidden_layers=lambda: 2,
        get_num_experts=lambda: 256,
        get_num_experts_per_tok=lambda: TOP_K,
        hf_text_config=SimpleNamespace(model_type="longcat_flash", zero_expert_num=128),
    )
    parallel_config = SimpleNamespace(data_parallel_rank=0, tensor_parallel_size=1)
    capturer = RoutedExpertsCapturer(9, SimpleNamespace(model_config=model_config, parallel_config=parallel_config))
    assert capturer.output_dtype == torch.uint16  # 255 is not enough for 256 + 128 experts
    router, inputs = make_router(), make_inputs(7, 64)
    inputs[1][2] = torch.nan
    router.set_capture_fn(functools.partial(capturer.capture, 1))
    with set_forward_context(None, vllm_config):
        router.select_experts(*inputs)

    array = capturer.snapshot_routing_data(7).numpy()
    layer = zexpert.FusedMoE(
        NUM_EXPERTS, TOP_K, 64, 32, zero_expert_type="identity", zero_expert_num=NUM_ZERO_EXPERTS,
        e_score_correction_bias=BIAS,
    )  # fmt: skip
    record = zexpert.choices.record_of_routed_experts([array], layer, layers={"": 1})
    expected = biased_topk_choices(inputs[1], BIAS, TOP_K, num_real_experts=NUM_EXPERTS)
    assert torch.equal(record[""].int(), expected)
    assert record[""][2].tolist() == [-1] * TOP_K
    with zexpert.replay_choices(layer, record):
        layer(*inputs)


@torch.inference_mode()
def test_the_load_balancer_sees_no_zero_experts(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(topk_ids: Tensor, **_: Any) -> Tensor:
        seen.append(topk_ids)
        return topk_ids

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", spy)
    layer = make_layer(torch.float32, "balanced")
    state = EplbLayerState()
    for name in ("expert_load_view", "logical_to_physical_map", "logical_replica_count", "should_record_tensor"):
        setattr(state, name, torch.zeros(1))
    state.num_unpadded_tokens_tensors = [None]
    layer.router.eplb_state = state
    inputs = make_inputs(7, 64)
    _, topk_ids = layer.router.select_experts(*inputs)
    expected = reference.biased_topk(inputs[1], BIAS, TOP_K, num_real_experts=NUM_EXPERTS).topk_ids
    assert torch.equal(seen[0].long(), expected)
    assert torch.equal(topk_ids.long(), expected)


@torch.inference_mode()
def test_dispatch_of_deepep_gets_no_zero_experts(vllm_config: Any) -> None:
    """DeepEP itself needs GPUs: here only the class's name is looked at, and the table that the other dispatch has."""
    layer = make_layer(torch.float32, "dispatched")
    experts = layer.routed_experts
    experts.quant_method.unquantized_backend = UnquantizedMoeBackend.CPU
    inputs = make_inputs(7, 64)
    for name, table, smallest in (
        ("DeepEPHTPrepareAndFinalize", None, -1),
        ("DeepEPLLPrepareAndFinalize", None, -1),
        ("DeepEPLLPrepareAndFinalize", torch.arange(NUM_EXPERTS), 0),
        ("MoEPrepareAndFinalizeNoDPEPModular", None, 0),
    ):
        dispatch = type(name, (), {"global_to_physical": table})()
        experts.quant_method.moe_kernel = SimpleNamespace(
            prepare_finalize=dispatch, fused_experts=SimpleNamespace(consumes_expert_mask=False)
        )
        assert int(layer.router.select_experts(*inputs)[1].min()) == smallest


def test_log_says_who_computes_the_experts(vllm_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Once per kind of layer, and the process's line if its log was not set up before."""
    init = functools.partial(plugin._init_runner, lambda *_: None, router_class=ZeroExpertRouter)
    layer = make_layer(torch.float32, "logged")
    plugin._logged.clear()
    with caplog.at_level("INFO", "vllm.zexpert"):
        init(layer)
        init(layer)
        layer.routed_experts.quant_method.unquantized_backend = UnquantizedMoeBackend.CPU
        init(layer)
    assert caplog.messages == [
        f"zexpert {zexpert.__version__} routes zero experts of vLLM {vllm.__version__} (tested with 0.32.0)",
        "zexpert: routing and experts of layers with 6 experts and 3 zero experts",
        "zexpert: routing only of layers with 6 experts and 3 zero experts; vLLM computes the experts, because the "
        "backend is CPU, not TRITON",
    ]
