# SPDX-License-Identifier: Apache-2.0
"""kernel_plan: its answers, its agreement with what the operators do, its errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import zexpert

OPS = [
    "biased_topk",
    "biased_topk_and_plan",
    "biased_topk_choices",
    "router_logits",
    "route",
    "zero_expert_accumulate",
    "moe_plan",
    "moe_permute",
    "silu_and_mul",
    "grouped_mlp",
    "fused_moe",
    "moe_finalize",
    "quantize_blockwise",
    "dequantize_blockwise",
    "moe_dispatch",
    "moe_combine",
    "rank_barrier",
]
VECTORISED = [
    "biased_topk",
    "router_logits",
    "zero_expert_accumulate",
    "silu_and_mul",
    "moe_finalize",
    "quantize_blockwise",
    "dequantize_blockwise",
]
DECODING = {"num_tokens": 256, "num_experts": 768, "top_k": 12, "compute_capability": 9}
GROUPED = {"num_rows": 8, "num_experts": 4}
INFERENCE = {"dtype": "float16", "keep_gate_up": False}
SIZES: dict[str, dict[str, Any]] = {"grouped_mlp": GROUPED, "fused_moe": {**GROUPED, "keep_gate_up": False}}


def most_streamed_rows() -> int:
    """Rows of the longest segment that grouped_mlp's own kernel takes, as the plan has it."""
    rows = 1
    while zexpert.kernel_plan("grouped_mlp", num_rows=rows + 1, num_experts=1).backend == "cpu":
        rows += 1
    return rows


@pytest.mark.parametrize("op", OPS)
def test_every_operator_has_a_plan(op: str) -> None:
    plan = zexpert.kernel_plan(op, **SIZES.get(op, {}))
    assert plan.op == op
    assert plan.backend == "cpu"
    assert plan.kernel
    assert plan.reason.endswith(".")
    assert plan.reason.count(". ") == 0
    assert repr(plan).startswith(f"KernelPlan(op='{op}', backend='cpu', kernel='{plan.kernel}', reason=")


@pytest.mark.parametrize("op", OPS)
def test_planned_operators_are_those_there_are(op: str) -> None:
    assert hasattr(torch.ops.zexpert, op)


@pytest.mark.parametrize("op", VECTORISED)
def test_kernel_names_the_instruction_set_in_use(op: str) -> None:
    capability = zexpert.build_info()["cpu_capability"]
    plan = zexpert.kernel_plan(op)
    assert plan.kernel == f"{op}_{capability.lower()}"
    assert capability in plan.reason


def test_choice_and_plan_are_two_kernels_on_a_cpu() -> None:
    names = [zexpert.kernel_plan(op).kernel for op in ("biased_topk", "moe_plan")]
    assert zexpert.kernel_plan("biased_topk_and_plan").kernel == ", ".join(names)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_route_runs_the_kernels_of_its_parts(device: str) -> None:
    sizes: dict[str, Any] = {"device": device, "dtype": "bfloat16", **DECODING}
    names = [zexpert.kernel_plan(op, **sizes).kernel for op in ("router_logits", "biased_topk_and_plan")]
    assert zexpert.kernel_plan("route", **sizes).kernel == ", ".join(names)


def test_plan_follows_the_lowered_capability() -> None:
    code = "import zexpert; print(zexpert.kernel_plan('biased_topk').kernel)"
    environment = {**os.environ, "ZEXPERT_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "biased_topk_default"


@pytest.mark.parametrize("more", [0, 1])
def test_grouped_mlp_does_what_its_plan_says(more: int) -> None:
    num_rows = most_streamed_rows() + more
    plan = zexpert.kernel_plan("grouped_mlp", num_rows=num_rows, num_experts=1)
    rows = torch.randn(num_rows, 32)
    expert_offsets = torch.tensor([0, num_rows], dtype=torch.int32)
    w13_weight, w2_weight = torch.randn(1, 48, 32), torch.randn(1, 32, 24)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.zexpert.grouped_mlp(rows, expert_offsets, w13_weight, w2_weight)
    called = {event.key for event in profile.key_averages()}
    assert ("aten::mm" in called) == (plan.backend == "torch") == bool(more)


@pytest.mark.parametrize("implementation", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("keep_gate_up", [False, True])
def test_fused_moe_does_what_its_plan_says(keep_gate_up: bool, implementation: str) -> None:
    num_rows = most_streamed_rows()
    plan = zexpert.kernel_plan(
        "fused_moe", num_rows=num_rows, num_experts=1, keep_gate_up=keep_gate_up, implementation=implementation
    )
    assert plan.implementation == ("cpu" if implementation == "auto" else implementation)
    expert_offsets, row_slots, slot_rows = zexpert.ops.moe_plan(torch.zeros(num_rows, 1).int(), 1)
    weights = torch.randn(num_rows, 1), torch.randn(num_rows)
    w13_weight, w2_weight = torch.randn(1, 48, 32), torch.randn(1, 32, 24)
    given = (torch.randn(num_rows, 32), *weights, expert_offsets, row_slots, slot_rows, w13_weight, w2_weight)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.zexpert.fused_moe(*given, keep_gate_up=keep_gate_up, implementation=implementation)
    called = {event.key for event in profile.key_averages()}
    assert ("aten::mm" in called) == (plan.backend == "torch") == (keep_gate_up or implementation == "torch")


def test_grouped_mlp_spreads_rows_over_experts() -> None:
    limit = most_streamed_rows()
    for num_rows, backend in [(0, "cpu"), (8 * limit, "cpu"), (8 * limit + 1, "torch")]:
        assert zexpert.kernel_plan("grouped_mlp", num_rows=num_rows, num_experts=8).backend == backend


def test_num_tokens_and_top_k_stand_for_num_rows() -> None:
    by_tokens = zexpert.kernel_plan("grouped_mlp", num_tokens=512, top_k=12, num_experts=64)
    by_rows = zexpert.kernel_plan("grouped_mlp", num_rows=512 * 12, num_experts=64)
    assert (by_tokens.backend, by_tokens.kernel, by_tokens.reason) == (by_rows.backend, by_rows.kernel, by_rows.reason)
    assert by_tokens.reason.startswith("6144 rows for 64 experts")


def test_torch_types_are_taken_as_well_as_names() -> None:
    plan = zexpert.kernel_plan("silu_and_mul", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert zexpert.kernel_plan("moe_plan", device="cuda:1").backend == "cuda"
    assert plan.kernel == zexpert.kernel_plan("silu_and_mul", device="cpu", dtype="bfloat16").kernel
    assert zexpert.kernel_plan("moe_plan", dtype=torch.int64).backend == "cpu"


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("top_k", {}, r'^op must be "biased_topk", .* or "rank_barrier", got "top_k"$'),
        ("biased_topk", {"device": "tpu"}, r'^device must be "cpu" or "cuda", got "tpu"$'),
        ("biased_topk", {"dtype": torch.int8}, r'^dtype must be "float32", .* or "float16", got "int8"$'),
        ("moe_plan", {"dtype": "float32"}, r'^dtype \(of moe_plan\'s ids\) must be "int32" or "int64", got "float32"$'),
        ("biased_topk", {"num_tokens": -1}, r"^num_tokens must be at least 0, got -1$"),
        ("grouped_mlp", {"experts_backend": "gpu"}, r'^experts_backend must be "auto" or "hopper", got "gpu"$'),
        ("biased_topk", {"top_k": 0}, r"^top_k must be at least 1, got 0$"),
        ("biased_topk", {"top_k": 65}, r"^top_k must be between 1 and 64, got 65$"),
        (
            "biased_topk_and_plan",
            {"top_k": 9, "num_logits": 8},
            r"^top_k must be at most the number of experts \(8\), got 9$",
        ),
        (
            "biased_topk",
            {"device": "cuda", "dtype": "float64"},
            r"^dtype must be float32, bfloat16 or float16 on CUDA, got float64$",
        ),
        *(
            (op, {"device": "cuda", name: 8193}, rf"^{name} must be at most 8192 on CUDA, got 8193$")
            for op, name in (
                ("biased_topk", "num_logits"),
                ("biased_topk_and_plan", "num_logits"),
                ("route", "num_logits"),
                ("moe_plan", "num_experts"),
            )
        ),
        (
            "grouped_mlp",
            {"num_tokens": 2**62, "top_k": 4, "num_experts": 8},
            r"^num_tokens must be less than 2\^31, got",
        ),
        ("biased_topk_and_plan", {"compute_capability": 0}, r"^compute_capability must be at least 1, got 0$"),
        ("biased_topk_and_plan", {"compute_capability": 90}, r"^compute_capability must be a major number,.* got 90$"),
        ("grouped_mlp", {"num_rows": 1, "num_experts": 0}, r"^num_experts must be at least 1, got 0$"),
        (
            "grouped_mlp",
            {**GROUPED, "implementation": "gpu"},
            r'^implementation must be "auto", "cpu", "hopper", "grouped_mm" or "torch", got "gpu"$',
        ),
        (
            "grouped_mlp",
            {**GROUPED, "implementation": "hopper"},
            r'^implementation must be "auto", "cpu" or "torch" on the CPU, got "hopper"$',
        ),
        (
            "grouped_mlp",
            {**GROUPED, "device": "cuda", "implementation": "cpu"},
            r'^implementation must be "auto", "hopper", "grouped_mm" or "torch" on a GPU, got "cpu"$',
        ),
        (
            "fused_moe",
            {"device": "cuda", "implementation": "hopper", "dtype": "bfloat16", "compute_capability": 8},
            r'^the GPU must be of compute capability 9.0 for implementation "hopper", got 8.0$',
        ),
        (
            "fused_moe",
            {"device": "cuda", "implementation": "hopper", "dtype": "bfloat16", "compute_capability": 9},
            r'^keep_gate_up must be False for implementation "hopper", got True$',
        ),
        (
            "fused_moe",
            {"device": "cuda", "implementation": "grouped_mm", "dtype": "float16"},
            r'^w13_weight must be bfloat16 for implementation "grouped_mm", got float16$',
        ),
        (
            "fused_moe",
            {"device": "cuda", "implementation": "grouped_mm", "dtype": "bfloat16", "intermediate_size": 12},
            r'^intermediate_size must be a multiple of 8 for implementation "grouped_mm", got 12$',
        ),
        ("grouped_mlp", {"num_rows": 1}, r"^grouped_mlp chooses .*: num_experts must be given$"),
        (
            "grouped_mlp",
            {"num_tokens": 1, "num_experts": 2},
            r"^grouped_mlp chooses .*: num_rows, or num_tokens and top_k, must be given$",
        ),
    ],
)
def test_bad_questions_get_a_sentence(op: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zexpert.kernel_plan(op, **arguments)


@pytest.mark.parametrize(
    ("op", "sizes", "backend", "kernel"),
    [
        ("biased_topk", {"num_logits": 768, "top_k": 12}, "cuda", "biased_topk_warp"),
        ("biased_topk", {"num_logits": 1025, "top_k": 12}, "cuda", "biased_topk_block"),
        ("biased_topk", {"num_experts": 768, "top_k": 33}, "cuda", "biased_topk_block"),
        ("biased_topk_and_plan", {"compute_capability": 9}, "cuda", "biased_topk_and_plan"),
        ("biased_topk_and_plan", {**DECODING, "compute_capability": 9}, "cuda", "biased_topk_and_plan"),
        ("biased_topk_and_plan", {**DECODING, "compute_capability": 10}, "cuda", "biased_topk_and_plan"),
        ("biased_topk_and_plan", {**DECODING, "compute_capability": 8}, "cuda", "biased_topk_warp, counting_sort"),
        ("biased_topk_and_plan", {**DECODING, "num_tokens": 257}, "cuda", "biased_topk_warp, counting_sort"),
        ("biased_topk_and_plan", {**DECODING, "top_k": 17}, "cuda", "biased_topk_warp, counting_sort"),
        ("biased_topk_and_plan", {**DECODING, "num_logits": 1025}, "cuda", "biased_topk_block, counting_sort"),
        ("moe_plan", {}, "cuda", "counting_sort"),
        ("zero_expert_accumulate", {}, "cuda", "zero_expert_accumulate"),
        ("moe_permute", {}, "cuda", "moe_permute"),
        ("silu_and_mul", {}, "cuda", "silu_and_mul"),
        ("moe_finalize", {}, "cuda", "moe_finalize"),
        ("moe_dispatch", {}, "cuda", "place_tokens, send_rows"),
        ("moe_combine", {}, "cuda", "moe_combine"),
        ("rank_barrier", {}, "cuda", "rank_barrier"),
        ("grouped_mlp", {"compute_capability": 8}, "torch", "loop"),
        ("fused_moe", {"dtype": "float16", "compute_capability": 8, "keep_gate_up": False}, "torch", "loop"),
        ("fused_moe", {"dtype": "float16", "compute_capability": 9}, "torch", "loop"),
        (
            "fused_moe",
            {"dtype": "float16", "compute_capability": 9, "keep_gate_up": False},
            "cuda",
            "grouped_product",
        ),
        ("fused_moe", {"dtype": "bfloat16", "compute_capability": 9}, "torch", "grouped_mm"),
        ("grouped_mlp", {"dtype": "bfloat16", "intermediate_size": 20}, "torch", "loop"),
    ],
)
def test_cuda(op: str, sizes: dict[str, Any], backend: str, kernel: str) -> None:
    plan = zexpert.kernel_plan(op, device="cuda", **sizes)
    assert (plan.backend, plan.kernel) == (backend, kernel)


@pytest.mark.parametrize(
    ("more", "kernel", "reason"),
    [
        ({}, "grouped_product", r"^Tiles of up to 64 rows of an expert by 256 of its weights: "),
        ({"num_rows": 1024 * 12}, "grouped_product", r"^Tiles of up to 160 rows of an expert"),
        (
            {"num_rows": 2048 * 12},
            "grouped_product",
            r"^Tiles of up to 288 rows of an expert by 128 of its weights: ",
        ),
        ({"num_rows": 4096 * 12}, "grouped_product", r"^Tiles of up to 160 rows of an expert"),
        ({"dtype": "float16"}, "grouped_product", r"^Tiles "),
        ({"num_rows": None}, "grouped_product", r"^The rows of an expert decide on the tiles\.$"),
        ({"num_experts": None}, "grouped_product", r"^The rows of an expert decide on the tiles\.$"),
        (
            {"hidden_size": 72},
            "grouped_mm",
            r'^hidden_size must be a multiple of 64 for implementation "hopper", got 72: One',
        ),
        (
            {"intermediate_size": 96},
            "grouped_mm",
            r'^intermediate_size must be a multiple of 64 for implementation "hopper", got 96: One',
        ),
        # PyTorch's grouped_mm accepts fewer than 1024 experts.
        (
            {"num_experts": 1025},
            "loop",
            r'^the number of experts must be at most 1024 for implementation "hopper", got 1025: The experts run one',
        ),
        (
            {"dtype": "float32"},
            "loop",
            r'^w13_weight must be bfloat16 or float16 for implementation "hopper", got float32: The experts run one',
        ),
    ],
)
def test_hopper(more: dict[str, Any], kernel: str, reason: str) -> None:
    asked = {"dtype": "bfloat16", "num_experts": 64, "num_rows": 12, "hidden_size": 2048, "intermediate_size": 768}
    plan = zexpert.kernel_plan("grouped_mlp", device="cuda", **{"compute_capability": 9, **asked, **more})
    assert plan.kernel == kernel
    assert plan.implementation == {"grouped_product": "hopper", "loop": "torch"}.get(kernel, kernel)
    alias = zexpert.kernel_plan("grouped_mlp", device="cuda", **{"experts_backend": "hopper", **asked, **more})
    assert (alias.kernel, alias.reason) == (plan.kernel, plan.reason)
    assert re.match(reason, plan.reason), plan.reason
    assert plan.reason.count(". ") == 0


def test_hopper_is_chosen_where_it_runs() -> None:
    plan = zexpert.kernel_plan("grouped_mlp", device="cuda", dtype="bfloat16", hidden_size=64)
    runs = torch.cuda.is_available() and torch.ops.zexpert.is_hopper(torch.zeros(1, device="cuda"))
    assert (plan.backend, plan.kernel) == (("cuda", "grouped_product") if runs else ("torch", "grouped_mm"))


def test_plans_are_made_by_kernel_plan_alone() -> None:
    for make in (zexpert._C.KernelPlan, lambda: zexpert._C.KernelPlan.__new__(zexpert._C.KernelPlan)):
        with pytest.raises(TypeError, match=r"^KernelPlan is made by kernel_plan\(\) alone$"):
            make()


@pytest.mark.parametrize(
    ("num_tokens", "blocks"), [(None, ""), (0, " by one block"), (256, " by one block"), (257, " by 2 blocks")]
)
def test_moe_plan_says_how_many_blocks_plan(num_tokens: int | None, blocks: str) -> None:
    plan = zexpert.kernel_plan("moe_plan", device="cuda", num_tokens=num_tokens, top_k=8)
    assert plan.reason == f"The slots are counted and placed on the device{blocks}."


def test_one_launch_is_planned_where_it_runs() -> None:
    sizes = {name: size for name, size in DECODING.items() if name != "compute_capability"}
    plan = zexpert.kernel_plan("biased_topk_and_plan", device="cuda", **sizes)  # type: ignore[arg-type]
    runs = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
    assert plan.kernel == ("biased_topk_and_plan" if runs else "biased_topk_warp, counting_sort")
