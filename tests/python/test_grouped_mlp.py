# SPDX-License-Identifier: Apache-2.0
"""grouped_mlp against the reference: segments of every length, weights of every layout, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule, failing, layouts, unchanged
from zexpert.ops import grouped_mlp, moe_permute, moe_plan

# None, one, an odd few, the most that stream bfloat16 weights with AMX, a middling number, and enough for torch's
# matrix product in every dtype.
SEGMENTS = [0, 1, 3, 12, 33, 0, 170]


def offsets_of(segments: list[int]) -> Tensor:
    return torch.tensor([0, *segments]).cumsum(0).int()


def weights(
    num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    w13_weight = torch.randn(num_experts, 2 * intermediate_size, hidden_size) / max(hidden_size, 1) ** 0.5
    w2_weight = torch.randn(num_experts, hidden_size, intermediate_size) / max(intermediate_size, 1) ** 0.5
    return w13_weight.to(dtype), w2_weight.to(dtype)


def assert_agrees(result: Tensor, rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> None:
    """By the error rule, expert by expert: a mistake with one must not hide behind the errors of another."""
    assert result.dtype == rows.dtype
    given = (rows, expert_offsets, w13_weight, w2_weight)
    plain, expected = reference.grouped_mlp(*given, dtype=rows.dtype), reference.grouped_mlp(*given)
    offsets = expert_offsets.tolist()
    plain_error = (plain.double() - expected).abs()
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end > begin:
            # A single row's own plain error says little: the largest over all experts stands in for it.
            worst = expected[begin:end] + plain_error[: offsets[-1]].max()
            assert_error_rule(result[begin:end], worst, expected[begin:end], f"expert {expert}")


@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(200, 96), (257, 33), (1, 1), (5, 130), (1300, 16)])
def test_against_reference(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
    expert_offsets = offsets_of(SEGMENTS)
    rows = torch.randn(int(expert_offsets[-1]), hidden_size).to(dtype)
    w13_weight, w2_weight = weights(len(SEGMENTS), hidden_size, intermediate_size, dtype)
    with unchanged(rows, expert_offsets, w13_weight, w2_weight):
        result = grouped_mlp(rows, expert_offsets, w13_weight, w2_weight)
    assert_agrees(result, rows, expert_offsets, w13_weight, w2_weight)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("segments", [[0, 0], [1, 0], [0, 7], [50, 50], [200, 100], [150] * 8, []], ids=str)
def test_few_experts(segments: list[int], dtype: torch.dtype) -> None:
    expert_offsets = offsets_of(segments)
    rows = torch.randn(sum(segments), 200).to(dtype)
    given = (rows, expert_offsets, *weights(len(segments), 200, 40, dtype))
    result = grouped_mlp(*given)
    assert result.shape == rows.shape
    assert_agrees(result, *given)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows_past_the_last_offset_are_not_read(dtype: torch.dtype) -> None:
    expert_offsets = offsets_of([3, 20])
    rows = torch.randn(30, 40).to(dtype)
    w13_weight, w2_weight = weights(2, 40, 24, dtype)
    expected = grouped_mlp(rows[:23], expert_offsets, w13_weight, w2_weight)
    rows[23:] = torch.nan
    assert_equal(grouped_mlp(rows, expert_offsets, w13_weight, w2_weight)[:23], expected)


def test_rows_of_one_expert_do_not_reach_another() -> None:
    """A NaN stays with its row among the few, and with its expert."""
    expert_offsets = offsets_of([2, 20, 1])
    rows = torch.randn(23, 40)
    given = weights(3, 40, 24)
    expected = grouped_mlp(rows, expert_offsets, *given)
    rows[[1, 5]] = torch.nan
    result = grouped_mlp(rows, expert_offsets, *given)
    touched = result.isnan().any(dim=1).nonzero().flatten().tolist()
    assert touched == [1, 5]
    untouched = [row for row in range(23) if row not in touched]
    assert_error_rule(result[untouched], expected[untouched], expected[untouched].double())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_layouts_of_rows(dtype: torch.dtype) -> None:
    expert_offsets = offsets_of([3, 20])
    rows = torch.randn(23, 57).to(dtype)
    given = weights(2, 57, 24, dtype)
    for name, strided in layouts(rows).items():
        result = grouped_mlp(strided, expert_offsets, *given)
        assert result.is_contiguous(), name
        assert_agrees(result, rows, expert_offsets, *given)


def test_layouts_of_weights() -> None:
    expert_offsets = offsets_of([3, 20, 2])
    rows = torch.randn(25, 40)
    w13_weight, w2_weight = weights(3, 40, 24)
    expected = grouped_mlp(rows, expert_offsets, w13_weight, w2_weight)

    together = torch.randn(5, 48 * 40 + 40 * 24 + 7)  # both matrices of an expert in one row of a larger tensor
    together[:3, : 48 * 40] = w13_weight.flatten(1)
    together[:3, 48 * 40 : -7] = w2_weight.flatten(1)
    slices = (together[:3, : 48 * 40].unflatten(1, (48, 40)), together[:3, 48 * 40 : -7].unflatten(1, (40, 24)))
    assert slices[0].stride() == (together.stride(0), 40, 1)
    transposed = tuple(weight.mT.contiguous().mT for weight in (w13_weight, w2_weight))
    interleaved = tuple(weight.repeat_interleave(2, dim=2)[..., ::2] for weight in (w13_weight, w2_weight))
    last_first = tuple(weight.permute(1, 2, 0).contiguous().permute(2, 0, 1) for weight in (w13_weight, w2_weight))
    for given in (slices, transposed, interleaved, last_first):
        assert_equal(grouped_mlp(rows, expert_offsets, *given), expected)


def test_experts_that_share_weights() -> None:
    expert_offsets = offsets_of([3, 20, 2])
    rows = torch.randn(25, 40)
    w13_weight, w2_weight = weights(1, 40, 24)
    result = grouped_mlp(rows, expert_offsets, w13_weight.expand(3, 48, 40), w2_weight.expand(3, 40, 24))
    assert_agrees(result, rows, expert_offsets, w13_weight.expand(3, 48, 40), w2_weight.expand(3, 40, 24))


@pytest.mark.parametrize("segments", [[3, 20], [0, 0]], ids=str)
def test_sizes_of_zero(segments: list[int]) -> None:
    expert_offsets = offsets_of(segments)
    num_rows = sum(segments)
    rows = torch.randn(num_rows, 40)
    assert_equal(grouped_mlp(rows, expert_offsets, *weights(2, 40, 0)), torch.zeros(num_rows, 40))
    assert grouped_mlp(rows[:, :0], expert_offsets, *weights(2, 0, 24)).shape == (num_rows, 0)


@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(0, 8), (1, 257), (7, 200), (190, 5), (400, 40)])
def test_gathers_tokens(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    """As if moe_permute had gathered them, bit for bit, in experts with few rows and with many."""
    top_k, num_experts = 3, 4
    chosen = torch.randint(-1, num_experts, (num_tokens, top_k)).masked_fill(torch.rand(num_tokens, top_k) < 0.3, 0)
    expert_offsets, row_slots, _ = moe_plan(chosen, num_experts)
    num_rows = int(expert_offsets[-1])
    tokens = torch.randn(num_tokens, hidden_size).to(dtype)
    given = weights(num_experts, hidden_size, 24, dtype)
    expected = grouped_mlp(moe_permute(tokens, row_slots, expert_offsets, top_k), expert_offsets, *given)[:num_rows]
    for name, strided in layouts(tokens).items():
        for slots in (row_slots, row_slots[:num_rows], row_slots.repeat_interleave(2)[::2]):
            with unchanged(strided, slots):
                result = grouped_mlp(strided, expert_offsets, *given, slots, top_k)
            assert result.shape == (len(slots), hidden_size), name
            assert_equal(result[:num_rows], expected)


def test_slots_past_the_last_offset_are_not_read() -> None:
    expert_offsets = offsets_of([3, 20])
    row_slots = torch.arange(24, dtype=torch.int32)
    tokens = torch.randn(12, 40)
    given = weights(2, 40, 24)
    expected = grouped_mlp(tokens, expert_offsets, *given, row_slots[:23], 2)
    row_slots[23] = -1
    assert_equal(grouped_mlp(tokens, expert_offsets, *given, row_slots, 2)[:23], expected)


def test_gradients_are_not_recorded_inside() -> None:
    """Parameters may ask for gradients; what the op computes with them inside must not."""
    expert_offsets = offsets_of([3, 20])
    rows = torch.randn(23, 40)
    given = weights(2, 40, 24)
    expected = grouped_mlp(rows, expert_offsets, *given)
    tracked = [weight.clone().requires_grad_() for weight in given]
    with torch.no_grad():
        assert_equal(grouped_mlp(rows, expert_offsets, *tracked), expected)
    assert_equal(grouped_mlp(rows, expert_offsets, *tracked).detach(), expected)
    with torch.inference_mode():
        assert_equal(grouped_mlp(rows, expert_offsets, *tracked), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(grouped_mlp(rows, expert_offsets, *given), expected)


def arguments(**changes: Any) -> dict[str, Any]:
    w13_weight, w2_weight = weights(2, 8, 4)
    given = {
        "rows": torch.randn(5, 8),
        "expert_offsets": offsets_of([2, 3]),
        "w13_weight": w13_weight,
        "w2_weight": w2_weight,
    }
    return {**given, **changes}


BAD_INPUT = {
    "integer rows": ({"rows": torch.zeros(5, 8).int()}, r"^rows must be float32, .*, got int32$"),
    "rows of one dimension": (
        {"rows": torch.zeros(8)},
        r"^rows must have 2 dimensions \[rows, hidden_size\], .* \[8\]$",
    ),
    "wide offsets": ({"expert_offsets": torch.zeros(3).long()}, r"^expert_offsets must be int32, got int64$"),
    "no offsets": ({"expert_offsets": torch.zeros(0).int()}, r"^expert_offsets must have at least 1 element, .*$"),
    "offsets for other experts": (
        {"expert_offsets": offsets_of([2, 2, 1])},
        r"^w13_weight must have shape \[3, 8, 8\] \[experts, 2 \* intermediate_size, hidden_size\], got \[2, 8, 8\]$",
    ),
    "offsets not from 0": (
        {"expert_offsets": torch.tensor([1, 2, 5]).int()},
        r"^expert_offsets must start at 0, got 1$",
    ),
    "offsets that descend": (
        {"expert_offsets": torch.tensor([0, 5, 2]).int()},
        r"^expert_offsets must ascend, got 2 after 5$",
    ),
    "last offset too large": (
        {"expert_offsets": torch.tensor([0, 2, 6]).int()},
        r"^expert_offsets must be at most the number of rows \(5\), got 6$",
    ),
    "w13 of another type": (
        {"w13_weight": torch.zeros(2, 8, 8).bfloat16()},
        r"^w13_weight must be float32 with float32 rows, got bfloat16$",
    ),
    "w2 of another type": (
        {"w2_weight": torch.zeros(2, 8, 4).double()},
        r"^w2_weight must be float32 with float32 rows, got float64$",
    ),
    "w13 of two dimensions": ({"w13_weight": torch.zeros(16, 8)}, r"^w13_weight must have 3 dimensions .*\[16, 8\]$"),
    "w13 of odd rows": (
        {"w13_weight": torch.zeros(2, 7, 8)},
        r"^w13_weight must have an even second size, .*\[2, 7, 8\]$",
    ),
    "w13 of another width": (
        {"w13_weight": torch.zeros(2, 8, 9)},
        r"^w13_weight must have shape \[2, 8, 8\] .*\[2, 8, 9\]$",
    ),
    "w2 transposed": (
        {"w2_weight": torch.zeros(2, 4, 8)},
        r"^w2_weight must have shape \[2, 8, 4\] .*, got \[2, 4, 8\]$",
    ),
    "w2 of fewer experts": (
        {"w2_weight": torch.zeros(1, 8, 4)},
        r"^w2_weight must have shape \[2, 8, 4\] .*\[1, 8, 4\]$",
    ),
    "a slot of no token": (
        {"rows": torch.randn(2, 8), "row_slots": torch.tensor([0, 1, 2, 6, 3]).int(), "top_k": 3},
        r"^row_slots must be in \[0, 6\) below the last offset, got 6$",
    ),
    "a negative slot": (
        {"row_slots": torch.tensor([0, 1, -1, 2, 3]).int()},
        r"^row_slots must be in \[0, 5\) below the last offset, got -1$",
    ),
    "too many slots": (
        {"row_slots": torch.zeros(6).int()},
        r"^row_slots must have at most 1 elements for each of the 5 tokens, got shape \[6\]$",
    ),
    "fewer slots than rows": (
        {"row_slots": torch.zeros(4).int()},
        r"^expert_offsets must be at most the number of rows \(4\), got 5$",
    ),
    "no slots per token but wide ones": (
        {"row_slots": torch.zeros(5).long(), "top_k": 0},
        r"^row_slots must be int32, got int64$",
    ),
    "slots per token without slots": ({"top_k": 3}, r"^top_k must be 1 without row_slots, got 3$"),
    "wide slots": ({"row_slots": torch.zeros(5).long()}, r"^row_slots must be int32, got int64$"),
    "slots of two dimensions": (
        {"row_slots": torch.zeros(5, 1).int()},
        r"^row_slots must have 1 dimension \[rows\], got shape \[5, 1\]$",
    ),
    "slots elsewhere": (
        {"row_slots": torch.zeros(5, device="meta").int()},
        r"^row_slots must be on cpu like rows, got meta$",
    ),
    "no slots per token": ({"row_slots": torch.zeros(0).int(), "top_k": 0}, r"^top_k must be at least 1, got 0$"),
    "w2 elsewhere": (
        {"w2_weight": torch.zeros(2, 8, 4, device="meta")},
        r"^w2_weight must be on cpu like rows, got meta$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    with pytest.raises(RuntimeError, match=sentence):
        grouped_mlp(**arguments(**changes))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("segments", [[0, 0], [3, 20]], ids=str)
def test_opcheck(segments: list[int], dtype: torch.dtype) -> None:
    rows = torch.randn(sum(segments), 19).to(dtype)
    given = (rows, offsets_of(segments), *weights(2, 19, 8, dtype))
    torch.library.opcheck(torch.ops.zexpert.grouped_mlp.default, given)
    slots = torch.arange(sum(segments)).int()
    torch.library.opcheck(torch.ops.zexpert.grouped_mlp.default, (*given, slots, 1))


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(grouped_mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    scripted = torch.jit.script(grouped_mlp)
    for segments in ([3, 20], [2, 0], [30, 1]):
        given = (torch.randn(sum(segments), 19), offsets_of(segments), *weights(2, 19, 8))
        for function in (compiled, scripted):
            assert_equal(function(*given), grouped_mlp(*given))
            slots = torch.arange(sum(segments)).int().flip(0)
            assert_equal(function(*given, slots, 1), grouped_mlp(*given, slots, 1))


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_product_of_pytorch_that_fails() -> None:
    """One sentence, not the dispatcher's."""
    rows, expert_offsets = torch.randn(300, 16), torch.tensor([0, 300], dtype=torch.int32)
    sizes = r"matrices of shapes \[300, 16\] and \[16, 20\] of float32 on cpu; the memory may be full"
    with failing("mm.out", "CPU"), pytest.raises(RuntimeError, match=rf"^PyTorch could not multiply {sizes}$"):
        grouped_mlp(rows, expert_offsets, *weights(1, 16, 10))
    grouped_mlp(rows, expert_offsets, *weights(1, 16, 10))
