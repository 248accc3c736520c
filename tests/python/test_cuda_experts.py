# SPDX-License-Identifier: Apache-2.0
"""grouped_mlp and fused_moe in every implementation, on the CPU and on a CUDA device: forward and backward against
plain PyTorch, what is kept, compilation, graphs, forced implementations that cannot serve."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import reference
import zexpert
from gradients import assert_gradients, gradients_of, poisoned
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule, failing, unchanged, weight_dtype
from zexpert import DispatchPlan, ops

K, R = 3, 6
#: Sizes that every implementation serves.
HIDDEN, INNER = 128, 64
#: Rows of each expert: some have none, one has all, nobody has any, one row each.
PROFILES = {
    "some": [0, 3, 0, 41, 7, 170],
    "one takes all": [0, 0, 90, 0, 0, 0],
    "none": [0] * R,
    "one row each": [1] * R,
}


class Place(NamedTuple):
    """Where the experts run, and how."""

    device: str
    implementation: str

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        if self.implementation == "hopper":
            return (torch.bfloat16, torch.float16)
        return (torch.bfloat16,) if self.implementation == "grouped_mm" else FLOAT_DTYPES

    @property
    def has_gradients(self) -> bool:
        return self.implementation != "hopper"


PLACES = [Place("cpu", name) for name in ("auto", "cpu", "torch")]
PLACES += [Place("cuda", name) for name in ("auto", "hopper", "grouped_mm", "torch")]


def missing(place: Place) -> str:
    """What of the place this machine does not have; empty if it is here."""
    if place.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    if place.implementation == "hopper" and not torch.ops.zexpert.is_hopper(torch.zeros(1, device="cuda")):
        return "no GPU of compute capability 9.0, or no code for 9.0a"
    return ""


def params(
    places: list[Place] = PLACES, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES, gradients: bool = False
) -> pytest.MarkDecorator:
    """Every place with every dtype that it serves."""
    cases = [
        pytest.param(
            place,
            dtype,
            id=f"{place.device}-{place.implementation}-{str(dtype)[6:]}",
            marks=pytest.mark.skipif(bool(missing(place)), reason=missing(place)),
        )
        for place in places
        for dtype in dtypes
        if dtype in place.dtypes and (place.has_gradients or not gradients)
    ]
    return pytest.mark.parametrize(("place", "dtype"), cases)


ON_GPU = [place for place in PLACES if place.device == "cuda"]
#: The host does not wait for these, so a CUDA graph captures them.
WITHOUT_WAITING = [place for place in ON_GPU if place.implementation in ("hopper", "grouped_mm")]
needs_cuda = pytest.mark.skipif(bool(missing(ON_GPU[0])), reason=missing(ON_GPU[0]))
needs_hopper = pytest.mark.skipif(bool(missing(Place("cuda", "hopper"))), reason=missing(Place("cuda", "hopper")))


def is_hopper_or_blackwell() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


def offsets_of(segments: list[int], device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(segments)], dtype=torch.int32, device=device)


def weights(
    dtype: torch.dtype, device: str, num_experts: int = R, hidden: int = HIDDEN, inner: int = INNER
) -> tuple[Tensor, Tensor]:
    w13_weight = torch.randn(num_experts, 2 * inner, hidden) / hidden**0.5
    w2_weight = torch.randn(num_experts, hidden, inner) / inner**0.5
    return w13_weight.to(dtype).to(device), w2_weight.to(dtype).to(device)


def make_ids(num_tokens: int, num_experts: int = R) -> Tensor:
    """Some slots do no work, and expert 2 has none to do."""
    ids = torch.randint(-2, num_experts, (num_tokens, K)).clamp(min=-1)
    return ids.masked_fill(ids == 2, -1)


def make_moe(
    dtype: torch.dtype, device: str, ids: Tensor, hidden: int = HIDDEN, inner: int = INNER
) -> tuple[DispatchPlan, dict[str, Tensor]]:
    """The plan and what fused_moe has gradients of."""
    num_tokens = ids.shape[0]
    w13_weight, w2_weight = weights(dtype, device, R, hidden, inner)
    given = {
        "hidden_states": torch.randn(num_tokens, hidden).to(dtype),
        "topk_weights": torch.rand(num_tokens, K, dtype=weight_dtype(dtype)),
        "zero_weight": torch.rand(num_tokens, dtype=weight_dtype(dtype)),
        "w13_weight": w13_weight,
        "w2_weight": w2_weight,
        "residual": torch.randn(num_tokens, hidden).to(dtype),
        "constant_weight": torch.rand(num_tokens, 2, dtype=weight_dtype(dtype)),
        "constant_vectors": torch.randn(2, hidden).to(dtype),
    }
    plan = ops.moe_plan(ids.to(device), R)
    return plan, {name: tensor.to(device) for name, tensor in given.items()}


def plain_moe(ids: Tensor, given: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Expert by expert: sums over one token at a time would round less than any matrix product."""
    x = given["hidden_states"].to(dtype)
    out = given["zero_weight"].to(dtype)[:, None] * x
    for expert in range(R):
        tokens, slots = torch.where(ids == expert)
        gate_up = x[tokens] @ given["w13_weight"][expert].to(dtype).T
        activation = reference.silu_and_mul(gate_up, dtype=dtype)
        slot_weights = given["topk_weights"][tokens, slots, None].to(dtype)
        out = out.index_add(0, tokens, slot_weights * (activation @ given["w2_weight"][expert].to(dtype).T))
    out = out + given["constant_weight"].to(dtype) @ given["constant_vectors"].to(dtype)
    return out + given["residual"].to(dtype)


def assert_rows_agree(result: Tensor, rows: Tensor, expert_offsets: Tensor, *given: Tensor) -> None:
    """By the error rule, expert by expert: a mistake with one must not hide behind the errors of another."""
    plain, expected = (
        reference.grouped_mlp(rows, expert_offsets, *given, dtype=dtype) for dtype in (rows.dtype, torch.float64)
    )
    offsets = expert_offsets.tolist()
    assert result.dtype == rows.dtype
    worst = (plain.double() - expected)[: offsets[-1]].abs()
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end > begin:
            # A single row's own plain error says little: the largest over all experts stands in for it.
            allowance = expected[begin:end] + worst.max()
            assert_error_rule(result[begin:end], allowance, expected[begin:end], f"expert {expert}")


# Forward


@params()
@pytest.mark.parametrize("profile", PROFILES)
def test_grouped_mlp(profile: str, place: Place, dtype: torch.dtype) -> None:
    expert_offsets = offsets_of(PROFILES[profile], place.device)
    rows = torch.randn(sum(PROFILES[profile]) + 5, HIDDEN).to(dtype).to(place.device)  # five do no work
    given = weights(dtype, place.device)
    with unchanged(rows, expert_offsets, *given):
        result = ops.grouped_mlp(rows, expert_offsets, *given, implementation=place.implementation)
    assert result.shape == rows.shape
    assert_rows_agree(result, rows, expert_offsets, *given)


@params([place for place in PLACES if place.implementation in ("auto", "cpu", "torch")])
def test_sizes_that_fit_no_grouped_product(place: Place, dtype: torch.dtype) -> None:
    expert_offsets = offsets_of(PROFILES["some"], place.device)
    rows = torch.randn(sum(PROFILES["some"]), 65).to(dtype).to(place.device)
    given = weights(dtype, place.device, hidden=65, inner=33)
    result = ops.grouped_mlp(rows, expert_offsets, *given, implementation=place.implementation)
    assert_rows_agree(result, rows, expert_offsets, *given)


@params()
def test_rows_past_the_last_offset_do_not_count(place: Place, dtype: torch.dtype) -> None:
    expert_offsets = offsets_of([3, 0, 20, 1, 0, 4], place.device)
    rows = torch.randn(33, HIDDEN).to(dtype).to(place.device)
    given = weights(dtype, place.device)
    run = lambda rows: ops.grouped_mlp(rows, expert_offsets, *given, implementation=place.implementation)  # noqa: E731
    assert_equal(run(poisoned(rows, 28))[:28], run(rows)[:28])


@params()
def test_tokens_are_gathered(place: Place, dtype: torch.dtype) -> None:
    """As if moe_permute had gathered them, bit for bit."""
    expert_offsets, row_slots, _ = ops.moe_plan(make_ids(50).to(place.device), R)
    num_rows = int(expert_offsets[-1])
    tokens = torch.randn(50, HIDDEN).to(dtype).to(place.device)
    given = weights(dtype, place.device)
    rows = ops.moe_permute(tokens, row_slots, expert_offsets, K)
    expected = ops.grouped_mlp(rows, expert_offsets, *given, implementation=place.implementation)
    result = ops.grouped_mlp(tokens, expert_offsets, *given, row_slots, K, implementation=place.implementation)
    assert_equal(result[:num_rows], expected[:num_rows])


@params()
def test_rows_that_begin_anywhere(place: Place, dtype: torch.dtype) -> None:
    """Kernels read 16 bytes at a time; other rows are copied first."""
    expert_offsets = offsets_of([3, 0, 20, 1, 0, 4], place.device)
    wide = torch.randn(28, HIDDEN + 3).to(dtype).to(place.device)
    given = weights(dtype, place.device)
    for rows in (wide[:, 1:-2], wide[:1, 1:-2].expand(28, HIDDEN)):
        result = ops.grouped_mlp(rows, expert_offsets, *given, implementation=place.implementation)
        assert_rows_agree(result, rows, expert_offsets, *given)


@params()
def test_weights_that_are_a_part_of_more_experts(place: Place, dtype: torch.dtype) -> None:
    expert_offsets = offsets_of([3, 20, 4], place.device)
    rows = torch.randn(27, HIDDEN).to(dtype).to(place.device)
    more = weights(dtype, place.device, 2 * R)
    parts = tuple(weight[2:5] for weight in more)
    expected = ops.grouped_mlp(
        rows, expert_offsets, *(part.clone() for part in parts), implementation=place.implementation
    )
    assert_equal(ops.grouped_mlp(rows, expert_offsets, *parts, implementation=place.implementation), expected)


@params()
@pytest.mark.parametrize("num_tokens", [0, 1, 200])
def test_fused_moe(num_tokens: int, place: Place, dtype: torch.dtype) -> None:
    ids = make_ids(num_tokens)
    plan, given = make_moe(dtype, place.device, ids)
    plain, expected = (plain_moe(ids.to(place.device), given, to) for to in (dtype, torch.float64))
    for keep_gate_up in (False, True):
        if keep_gate_up and not place.has_gradients:
            continue
        with unchanged(*plan, *given.values()):
            out, gate_up = ops.fused_moe(
                **plan._asdict(), **given, keep_gate_up=keep_gate_up, implementation=place.implementation
            )
        assert gate_up.shape == (num_tokens * K if keep_gate_up else 0, 2 * INNER)
        assert gate_up.dtype == dtype
        assert_error_rule(out, plain, expected, f"keep_gate_up={keep_gate_up}")


@params()
def test_fused_moe_is_its_parts(place: Place, dtype: torch.dtype) -> None:
    """Inference is grouped_mlp and moe_finalize, bit for bit."""
    plan, given = make_moe(dtype, place.device, make_ids(50))
    out, _ = ops.fused_moe(**plan._asdict(), **given, keep_gate_up=False, implementation=place.implementation)
    hidden_states, w13_weight, w2_weight = (given.pop(name) for name in ("hidden_states", "w13_weight", "w2_weight"))
    rows = ops.grouped_mlp(
        hidden_states, plan.expert_offsets, w13_weight, w2_weight, plan.row_slots, K,
        implementation=place.implementation,
    )  # fmt: skip
    assert_equal(out, ops.moe_finalize(rows, plan.slot_rows, hidden_states=hidden_states, **given))


@params()
def test_only_zero_experts_are_chosen(place: Place, dtype: torch.dtype) -> None:
    ids = torch.full((20, K), -1)
    plan, given = make_moe(dtype, place.device, ids)
    plain, expected = (plain_moe(ids.to(place.device), given, to) for to in (dtype, torch.float64))
    out, _ = ops.fused_moe(**plan._asdict(), **given, keep_gate_up=False, implementation=place.implementation)
    assert_error_rule(out, plain, expected)


@params(PLACES, (torch.bfloat16,))
def test_sizes_of_zero(place: Place, dtype: torch.dtype) -> None:
    expert_offsets = offsets_of([3, 0, 20, 1, 0, 4], place.device)
    rows = torch.randn(28, HIDDEN).to(dtype).to(place.device)
    w13_weight, w2_weight = weights(dtype, place.device)
    run = lambda *given: ops.grouped_mlp(*given, implementation=place.implementation)  # noqa: E731
    out = run(rows, expert_offsets, w13_weight[:, :0], w2_weight[:, :, :0])
    assert_equal(out, torch.zeros_like(rows))
    assert run(rows[:, :0], expert_offsets, w13_weight[:, :, :0], w2_weight[:, :0]).shape == (28, 0)
    assert run(rows, expert_offsets[:1], w13_weight[:0], w2_weight[:0]).shape == rows.shape


# Backward


@params(gradients=True)
@pytest.mark.parametrize("segments", [[0, 2, 0, 3, 0, 1], [1, 40, 7, 17, 0, 0]], ids=str)
def test_gradients_of_grouped_mlp(segments: list[int], place: Place, dtype: torch.dtype) -> None:
    expert_offsets = offsets_of(segments, place.device)
    rows = torch.randn(sum(segments), HIDDEN).to(dtype).to(place.device)
    assert_gradients(
        lambda rows, w13, w2: ops.grouped_mlp(rows, expert_offsets, w13, w2, implementation=place.implementation),
        lambda dtype: lambda rows, w13, w2: reference.grouped_mlp(rows, expert_offsets, w13, w2, dtype=dtype),
        [rows, *weights(dtype, place.device)],
        dtype,
        ["rows", "w13_weight", "w2_weight"],
    )


@params(gradients=True)
@pytest.mark.parametrize("keep_gate_up", [False, True])
def test_gradients_of_fused_moe(keep_gate_up: bool, place: Place, dtype: torch.dtype) -> None:
    ids = make_ids(100)
    plan, given = make_moe(dtype, place.device, ids)
    assert_gradients(
        lambda *tensors: ops.fused_moe(
            **plan._asdict(), **dict(zip(given, tensors, strict=True)), keep_gate_up=keep_gate_up,
            implementation=place.implementation,
        )[0],
        lambda dtype: lambda *tensors: plain_moe(
            ids.to(place.device), dict(zip(given, tensors, strict=True)), dtype
        ),
        list(given.values()),
        dtype,
        list(given),
    )  # fmt: skip


@params([place for place in PLACES if place.implementation in ("auto", "cpu", "torch")], (torch.float64,))
@pytest.mark.parametrize("keep_gate_up", [False, True])
def test_gradcheck(keep_gate_up: bool, place: Place, dtype: torch.dtype) -> None:
    ids = make_ids(7)
    plan, given = make_moe(dtype, place.device, ids, 5, 3)
    assert torch.autograd.gradcheck(
        lambda *tensors: ops.fused_moe(
            **plan._asdict(), **dict(zip(given, tensors, strict=True)), keep_gate_up=keep_gate_up,
            implementation=place.implementation,
        )[0],
        [tensor.requires_grad_() for tensor in given.values()],
    )  # fmt: skip


@params(gradients=True)
def test_what_does_no_work_does_not_reach_gradients(place: Place, dtype: torch.dtype) -> None:
    """Rows past the last offset are not read, and experts without rows have gradients of 0, whatever memory held."""
    plan, given = make_moe(dtype, place.device, make_ids(40))
    num_rows = int(plan.expert_offsets[-1])
    given["w13_weight"][2] = given["w2_weight"][2] = torch.nan  # expert 2 has no rows
    names = ("hidden_states", "topk_weights", "zero_weight")
    w13_weight, w2_weight = given["w13_weight"], given["w2_weight"]
    _, gate_up = ops.fused_moe(**plan._asdict(), **given, implementation=place.implementation)
    gradient = torch.randn_like(given["hidden_states"])
    dirty = [torch.full_like(weight, torch.nan) for weight in (w13_weight, w2_weight) for _ in range(2)]
    del dirty  # what is allocated next on a GPU holds these
    grads = torch.ops.zexpert.fused_moe_backward(
        gradient, *(given[name] for name in names), *plan, w13_weight, w2_weight, poisoned(gate_up, num_rows),
        implementation=place.implementation,
    )  # fmt: skip
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert bool((grads[1][plan.slot_rows < 0] == 0).all())
    for grad in grads[3:]:
        assert_equal(grad[2], torch.zeros_like(grad[2]))

    rows = ops.moe_permute(given["hidden_states"], plan.row_slots, plan.expert_offsets, K)
    grad_rows = torch.randn(*rows.shape).to(dtype).to(place.device)
    for kept in (None, poisoned(gate_up, num_rows)):
        grads = torch.ops.zexpert.grouped_mlp_backward(
            poisoned(grad_rows, num_rows), poisoned(rows, num_rows), plan.expert_offsets, w13_weight, w2_weight, kept,
            implementation=place.implementation,
        )  # fmt: skip
        assert all(bool(grad.isfinite().all()) for grad in grads)
        assert_equal(grads[0][num_rows:], torch.zeros_like(grads[0][num_rows:]))
        for grad in grads[1:]:
            assert_equal(grad[2], torch.zeros_like(grad[2]))


@params(gradients=True)
def test_gradients_of_every_layout(place: Place, dtype: torch.dtype) -> None:
    """Gradients arrive expanded, transposed, or as a part of more columns."""
    plan, given = make_moe(dtype, place.device, make_ids(30))
    rows = ops.moe_permute(given["hidden_states"], plan.row_slots, plan.expert_offsets, K)
    weights = (given["w13_weight"], given["w2_weight"])
    names = ("hidden_states", "topk_weights", "zero_weight")
    args = (*(given[name] for name in names), *plan, *weights)
    gate_up = ops.fused_moe(*args, implementation=place.implementation)[1]
    wide = torch.randn(rows.shape[0], HIDDEN + 3).to(dtype).to(place.device)
    for grad in (wide[:1, :-3].expand_as(rows), wide[:, 1:-2], wide[:, :-3].t().contiguous().t()):
        results = [
            torch.ops.zexpert.grouped_mlp_backward(
                gradient, rows, plan.expert_offsets, *weights, None, implementation=place.implementation
            )
            for gradient in (grad, grad.contiguous())
        ]
        results += [
            torch.ops.zexpert.fused_moe_backward(gradient, *args, gate_up, implementation=place.implementation)
            for gradient in (grad[:30], grad[:30].contiguous())
        ]
        for one, other in itertools.chain(zip(*results[:2], strict=True), zip(*results[2:], strict=True)):
            torch.testing.assert_close(one, other)


@params(gradients=True)
@pytest.mark.parametrize("num_tokens", [0, 20])
def test_gradients_where_nothing_does_work(num_tokens: int, place: Place, dtype: torch.dtype) -> None:
    ids = torch.full((num_tokens, K), -1)
    plan, given = make_moe(dtype, place.device, ids)
    for keep_gate_up in (False, True):
        results = gradients_of(
            lambda *tensors, keep=keep_gate_up: ops.fused_moe(
                **plan._asdict(), **dict(zip(given, tensors, strict=True)), keep_gate_up=keep,
                implementation=place.implementation,
            )[0],
            list(given.values()),
            [torch.ones_like(given["hidden_states"])],
        )  # fmt: skip
        grads = dict(zip(given, results, strict=True))
        for name in ("w13_weight", "w2_weight", "topk_weights"):
            assert_equal(grads[name], torch.zeros_like(given[name]), name)
        expected = given["zero_weight"][:, None].expand_as(given["hidden_states"]).to(dtype)
        assert_equal(grads["hidden_states"], expected)


@params(gradients=True)
def test_only_the_needed_gradients(place: Place, dtype: torch.dtype) -> None:
    plan, given = make_moe(dtype, place.device, make_ids(20))
    gate_up = ops.fused_moe(**plan._asdict(), **given, implementation=place.implementation)[1]
    args = [given[name] for name in ("hidden_states", "topk_weights", "zero_weight")]
    args += [*plan, given["w13_weight"], given["w2_weight"]]
    gradient = torch.randn_like(given["hidden_states"])
    backward = torch.ops.zexpert.fused_moe_backward
    expected = backward(gradient, *args, gate_up, implementation=place.implementation)
    names = ("needs_hidden_states", "needs_w13_weight", "needs_w2_weight")
    for needs in itertools.product((False, True), repeat=3):
        for kept in (gate_up, gate_up[:0]):
            results = backward(
                gradient, *args, kept, **dict(zip(names, needs, strict=True)), implementation=place.implementation
            )
            for is_needed, one, other in zip((needs[0], True, True, *needs[1:]), results, expected, strict=True):
                if is_needed:
                    torch.testing.assert_close(one, other)
                else:
                    assert one.shape == (0,)


@params(gradients=True)
def test_what_training_keeps(place: Place, dtype: torch.dtype) -> None:
    """The inputs and gate_up; no token rows and no results of experts."""
    plan, given = make_moe(dtype, place.device, make_ids(30))
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or len(kept) - 1, kept.__getitem__
    ):
        out, gate_up = ops.fused_moe(**plan._asdict(), **leaves, implementation=place.implementation)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*leaves.values(), *plan, gate_up)}
    assert all(tensor.untyped_storage().data_ptr() in storages for tensor in kept)
    assert out.requires_grad
    assert not gate_up.requires_grad


# The dispatcher


def without_gradients(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in given.items()}


@params(dtypes=(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("num_tokens", [0, 9])
def test_opcheck(num_tokens: int, place: Place, dtype: torch.dtype) -> None:
    # Every slot does work: results are compared whole.
    plan, given = make_moe(dtype, place.device, torch.randint(0, R, (num_tokens, K)))
    if place.has_gradients:
        given = {name: tensor.requires_grad_() for name, tensor in given.items()}
    named = {"implementation": place.implementation}
    args = [given[name] for name in ("hidden_states", "topk_weights", "zero_weight")]
    args += [*plan, given["w13_weight"], given["w2_weight"]]
    for keep_gate_up in (False, True) if place.has_gradients else (False,):
        torch.library.opcheck(torch.ops.zexpert.fused_moe.default, args, {"keep_gate_up": keep_gate_up, **named})
    rows = (args[0], plan.expert_offsets, *args[-2:], plan.row_slots, K)
    torch.library.opcheck(torch.ops.zexpert.grouped_mlp.default, rows, named)
    if place.has_gradients:
        detached = [tensor.detach() for tensor in args]
        gate_up = torch.randn(num_tokens * K, 2 * INNER).to(dtype).to(place.device)
        for kept in (gate_up, gate_up[:0]):
            torch.library.opcheck(
                torch.ops.zexpert.fused_moe_backward.default, (torch.randn_like(detached[0]), *detached, kept), named
            )


@params(dtypes=(torch.float32, torch.bfloat16))
def test_compiled(place: Place, dtype: torch.dtype) -> None:
    """One operator in the graph: nothing runs every expert on every token."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def run(plan: DispatchPlan, given: dict[str, Tensor]) -> Tensor:
        out, _ = ops.fused_moe(
            **plan._asdict(), **given, keep_gate_up=place.has_gradients, implementation=place.implementation
        )
        return out

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for num_tokens in (20, 33, 7):
        plan, given = make_moe(dtype, place.device, make_ids(num_tokens))
        with torch.no_grad():
            assert_equal(compiled(plan, given), run(plan, given))
    calls = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.zexpert.fused_moe in calls or torch.ops.zexpert.fused_moe.default in calls
    assert not any("mm" in str(call) or "matmul" in str(call) for call in calls)


@params(dtypes=(torch.float32, torch.bfloat16), gradients=True)
def test_compiled_training(place: Place, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    plan, given = make_moe(dtype, place.device, make_ids(20))

    def run(*tensors: Tensor) -> Tensor:
        return ops.fused_moe(
            **plan._asdict(), **dict(zip(given, tensors, strict=True)), implementation=place.implementation
        )[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    upstream = [torch.randn_like(given["hidden_states"])]
    actual = gradients_of(compiled, list(given.values()), upstream)
    for name, one, other in zip(given, actual, gradients_of(run, list(given.values()), upstream), strict=True):
        assert_equal(one, other, name)


@params(dtypes=(torch.bfloat16,))
def test_auto_runs_what_the_plan_prints(place: Place, dtype: torch.dtype) -> None:
    plan, given = make_moe(dtype, place.device, make_ids(20))
    for keep_gate_up in (False, True):
        printed = zexpert.kernel_plan(
            "fused_moe", device=place.device, dtype=dtype, num_tokens=20, top_k=K, num_experts=R, hidden_size=HIDDEN,
            intermediate_size=INNER, keep_gate_up=keep_gate_up,
        )  # fmt: skip
        outs = [
            ops.fused_moe(**plan._asdict(), **given, keep_gate_up=keep_gate_up, implementation=implementation)[0]
            for implementation in ("auto", printed.implementation)
        ]
        assert_equal(*outs)


# CUDA graphs


@params(WITHOUT_WAITING, (torch.bfloat16,))
@pytest.mark.skipif(not is_hopper_or_blackwell(), reason="no GPU of compute capability 9 or 10")
@pytest.mark.parametrize("training", [False, True])
def test_a_graph_that_replays_with_other_data(training: bool, place: Place, dtype: torch.dtype) -> None:
    if training and not place.has_gradients:
        pytest.skip("hopper has no gradients")
    plan, given = make_moe(dtype, place.device, make_ids(64))
    leaves = {name: tensor.requires_grad_(training) for name, tensor in given.items()}
    upstream = torch.randn_like(given["hidden_states"])

    def run() -> list[Tensor]:
        out, _ = ops.fused_moe(**plan._asdict(), **leaves, keep_gate_up=training, implementation=place.implementation)
        return [out, *torch.autograd.grad(out, list(leaves.values()), upstream)] if training else [out]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for ids in (make_ids(64), torch.full((64, K), -1), torch.full((64, K), 3)):
        fresh_plan, fresh = make_moe(dtype, place.device, ids)
        with torch.no_grad():
            for static, new in zip((*plan, *leaves.values()), (*fresh_plan, *fresh.values()), strict=True):
                static.copy_(new)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for one, other in zip(replayed, run(), strict=True):
            assert_equal(one, other)


CAPTURE = """
import torch
from test_cuda_experts import make_ids, make_moe, ops

plan, given = make_moe(torch.float32, "cuda", make_ids(20))
run = lambda: ops.fused_moe(**plan._asdict(), **given, implementation="torch")
run()
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run()
except RuntimeError as error:
    print("refused:", error)
"""


@needs_cuda
def test_a_graph_does_not_capture_what_waits() -> None:
    """In a process of its own, which an error during capture may leave without a device."""
    done = subprocess.run(
        [sys.executable, "-c", CAPTURE], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert re.search("^refused: .*captur", done.stdout), done.stdout + done.stderr


@params(ON_GPU, (torch.bfloat16,))
def test_side_stream(place: Place, dtype: torch.dtype) -> None:
    plan, given = make_moe(dtype, "cuda", make_ids(200))
    run = lambda: ops.fused_moe(  # noqa: E731
        **plan._asdict(), **given, keep_gate_up=False, implementation=place.implementation
    )[0]
    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = run()
    stream.synchronize()
    assert_equal(out, expected)


# Choices


@needs_hopper
def test_float16_runs_hopper_kernels_where_nothing_wants_gradients() -> None:
    """With grad mode on."""
    plan, given = make_moe(torch.float16, "cuda", make_ids(30))
    outs = [
        ops.fused_moe(**plan._asdict(), **given, keep_gate_up=False, implementation=implementation)[0]
        for implementation in ("auto", "hopper")
    ]
    assert_equal(*outs)


@needs_cuda
def test_more_experts_than_a_grouped_product_accepts() -> None:
    num_experts = 1024
    rows = torch.randn(2 * num_experts, 64, device="cuda").bfloat16().requires_grad_()
    expert_offsets = torch.arange(0, 2 * num_experts + 1, 2, dtype=torch.int32, device="cuda")
    given = weights(torch.bfloat16, "cuda", num_experts, 64, 64)
    out = ops.grouped_mlp(rows, expert_offsets, *given)
    out.sum().backward()
    assert_rows_agree(out.detach(), rows.detach(), expert_offsets, *given)
    assert rows.grad is not None
    assert bool(rows.grad.isfinite().all())


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_hopper)])
def test_hopper_has_no_gradients(device: str) -> None:
    """Nothing falls back silently."""
    sentence = r'^implementation must be "auto", "grouped_mm" or "torch" where gradients are wanted, got "hopper"$'
    plan, given = make_moe(torch.bfloat16, "cpu", make_ids(9))
    plan = DispatchPlan(*(tensor.to(device) for tensor in plan))
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in given.items()}
    with pytest.raises(RuntimeError, match=sentence):
        ops.fused_moe(**plan._asdict(), **leaves, keep_gate_up=False, implementation="hopper")
    with pytest.raises(RuntimeError, match=sentence):
        ops.grouped_mlp(
            leaves["hidden_states"], plan.expert_offsets, leaves["w13_weight"], leaves["w2_weight"], plan.row_slots, K,
            implementation="hopper",
        )  # fmt: skip
    with torch.no_grad():
        out, _ = ops.fused_moe(**plan._asdict(), **leaves, keep_gate_up=False, implementation="hopper")
        assert out.shape == (9, HIDDEN)


BAD_CHOICES = {
    "another name": ("cpu", {"implementation": "gpu"}, r'implementation must be "auto", .* or "torch", got "gpu"$'),
    "hopper on the CPU": (
        "cpu",
        {"implementation": "hopper"},
        r'implementation must be "auto", "cpu" or "torch" on the CPU, got "hopper"$',
    ),
    "grouped_mm on the CPU": (
        "cpu",
        {"implementation": "grouped_mm"},
        r'implementation must be "auto", "cpu" or "torch" on the CPU, got "grouped_mm"$',
    ),
    "cpu on a GPU": (
        "cuda",
        {"implementation": "cpu"},
        r'implementation must be "auto", "hopper", "grouped_mm" or "torch" on a GPU, got "cpu"$',
    ),
    "grouped_mm of float16": (
        "cuda",
        {"implementation": "grouped_mm", "dtype": torch.float16},
        r'w13_weight must be bfloat16 for implementation "grouped_mm", got float16$',
    ),
    "grouped_mm of odd sizes": (
        "cuda",
        {"implementation": "grouped_mm", "hidden": 68},
        r'hidden_size must be a multiple of 8 for implementation "grouped_mm", got 68$',
    ),
    "hopper of float32": (
        "hopper",
        {"implementation": "hopper", "dtype": torch.float32, "keep_gate_up": False},
        r'w13_weight must be bfloat16 or float16 for implementation "hopper", got float32$',
    ),
    "hopper of odd sizes": (
        "hopper",
        {"implementation": "hopper", "inner": 72, "keep_gate_up": False},
        r'intermediate_size must be a multiple of 64 for implementation "hopper", got 72$',
    ),
    "hopper that keeps gate_up": (
        "hopper",
        {"implementation": "hopper"},
        r'keep_gate_up must be False for implementation "hopper", got True$',
    ),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_a_forced_implementation_that_cannot_serve(case: str) -> None:
    device, changes, sentence = BAD_CHOICES[case]
    place = Place("cuda", "hopper") if device == "hopper" else Place(device, "auto")
    if missing(place):
        pytest.skip(missing(place))
    dtype, hidden, inner, implementation, keep_gate_up = (
        {"dtype": torch.bfloat16, "hidden": HIDDEN, "inner": INNER, "keep_gate_up": True, **changes}[name]
        for name in ("dtype", "hidden", "inner", "implementation", "keep_gate_up")
    )
    plan, given = make_moe(dtype, place.device, make_ids(9), hidden, inner)
    with pytest.raises(RuntimeError, match="^" + sentence):
        ops.fused_moe(**plan._asdict(), **given, keep_gate_up=keep_gate_up, implementation=implementation)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_grouped_mm_that_fails() -> None:
    """One sentence, not the dispatcher's."""
    place = Place("cuda", "grouped_mm")
    if missing(place):
        pytest.skip(missing(place))
    plan, given = make_moe(torch.bfloat16, "cuda", make_ids(9))
    sentence = (
        rf"^PyTorch's grouped_mm could not multiply tensors of shapes \[{9 * K}, {HIDDEN}\] and "
        rf"\[{R}, {HIDDEN}, {2 * INNER}\] of bfloat16 on cuda:0; the memory may be full$"
    )
    with failing("_grouped_mm", "CUDA"), pytest.raises(RuntimeError, match=sentence):
        ops.fused_moe(**plan._asdict(), **given, keep_gate_up=False, implementation="grouped_mm")


@params(dtypes=(torch.float32,))
def test_bad_gate_up(place: Place, dtype: torch.dtype) -> None:
    plan, given = make_moe(dtype, place.device, make_ids(9))
    args = [given[name] for name in ("hidden_states", "topk_weights", "zero_weight")]
    args += [*plan, given["w13_weight"], given["w2_weight"]]
    for shape in ((5, 2 * INNER), (9 * K, INNER), (0, INNER)):
        gate_up = torch.zeros(*shape, device=place.device)
        with pytest.raises(RuntimeError, match=r"^gate_up must have shape "):
            torch.ops.zexpert.fused_moe_backward(args[0], *args, gate_up, implementation=place.implementation)
