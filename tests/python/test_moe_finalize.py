# SPDX-License-Identifier: Apache-2.0
"""moe_finalize against the reference: every combination of parts, repeatability, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule, layouts, unchanged, weight_dtype
from zexpert.ops import moe_finalize, moe_plan

PARTS = ("residual", "constant_weight", "constant_vectors")


def arguments(
    num_tokens: int = 3,
    hidden_size: int = 8,
    dtype: torch.dtype = torch.float32,
    *,
    top_k: int = 3,
    num_constant_experts: int = 2,
    has_residual: bool = True,
) -> dict[str, Tensor | None]:
    """A third of the slots do no work, as slots of zero experts do."""
    weights = weight_dtype(dtype)
    topk_ids = torch.randint(-4, 8, (num_tokens, top_k)).clamp(min=-1)
    return {
        "rows": torch.randn(num_tokens * top_k, hidden_size).to(dtype),
        "slot_rows": moe_plan(topk_ids, 8).slot_rows,
        "topk_weights": torch.rand(num_tokens, top_k, dtype=weights).masked_fill(topk_ids < 0, 0.0),
        "hidden_states": torch.randn(num_tokens, hidden_size).to(dtype),
        "zero_weight": torch.rand(num_tokens, dtype=weights),
        "residual": torch.randn(num_tokens, hidden_size).to(dtype) if has_residual else None,
        "constant_weight": torch.rand(num_tokens, num_constant_experts, dtype=weights),
        "constant_vectors": torch.randn(num_constant_experts, hidden_size).to(dtype),
    }


def assert_agrees(result: Tensor, given: dict[str, Tensor | None]) -> None:
    hidden_states = given["hidden_states"]
    assert hidden_states is not None
    assert result.dtype == hidden_states.dtype
    plain = reference.moe_finalize(**given, dtype=hidden_states.dtype)  # type: ignore[arg-type]
    assert_error_rule(result, plain, reference.moe_finalize(**given))  # type: ignore[arg-type]


@pytest.mark.every_device("moe_finalize")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [0, 1, 200, 257])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_against_reference(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    given = arguments(num_tokens, hidden_size, dtype)
    with unchanged(*given.values()):
        result = moe_finalize(**given)
    assert result.shape == (num_tokens, hidden_size)
    assert_agrees(result, given)


@pytest.mark.every_device("moe_finalize")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("num_constant_experts", [None, 0, 1, 5])
def test_parts(num_constant_experts: int | None, has_residual: bool, dtype: torch.dtype) -> None:
    given = arguments(7, 57, dtype, has_residual=has_residual, num_constant_experts=num_constant_experts or 0)
    if num_constant_experts is None:
        given["constant_vectors"] = None
        assert_agrees(moe_finalize(**given), given)  # a routing without constant experts has weights of width 0
        given["constant_weight"] = None
    assert_agrees(moe_finalize(**given), given)


@pytest.mark.every_device("moe_finalize")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("top_k", [0, 1, 2, 12, 64])
def test_slots_per_token(top_k: int) -> None:
    given = arguments(9, 57, top_k=top_k)
    assert_agrees(moe_finalize(**given), given)


@pytest.mark.every_device("moe_finalize")
def test_no_rows() -> None:
    given = arguments(4, 57)
    given["rows"] = torch.zeros(0, 57)
    given["slot_rows"] = torch.full((4, 3), -1, dtype=torch.int32)
    assert_agrees(moe_finalize(**given), given)


@pytest.mark.every_device("moe_finalize")
def test_rows_without_a_slot_are_not_read() -> None:
    given = arguments(7, 57)
    rows, slot_rows = given["rows"], given["slot_rows"]
    assert rows is not None
    assert slot_rows is not None
    expected = moe_finalize(**given)
    rows[int(slot_rows.max()) + 1 :] = torch.nan
    assert_equal(moe_finalize(**given), expected)


@pytest.mark.every_device("moe_finalize")
def test_a_slot_without_work_adds_nothing_whatever_its_weight() -> None:
    given = arguments(7, 57)
    expected = moe_finalize(**given)
    topk_weights, slot_rows = given["topk_weights"], given["slot_rows"]
    assert topk_weights is not None
    assert slot_rows is not None
    topk_weights[slot_rows < 0] = torch.nan
    assert_equal(moe_finalize(**given), expected)


@pytest.mark.every_device("moe_finalize")
def test_order_of_rows_and_company_change_nothing() -> None:
    """The sum is in slot order, wherever the rows are and whichever other tokens there are."""
    given = arguments(40, 257, torch.bfloat16, top_k=8)
    expected = moe_finalize(**given)
    rows, slot_rows = given["rows"], given["slot_rows"]
    assert rows is not None
    assert slot_rows is not None
    order = torch.randperm(rows.shape[0])
    shuffled = torch.where(slot_rows >= 0, order.argsort().int()[slot_rows.long()], -1)
    assert_equal(moe_finalize(**{**given, "rows": rows[order], "slot_rows": shuffled}), expected)
    shared = ("rows", "constant_vectors")
    for token in range(40):
        alone = {name: tensor if name in shared else tensor[token : token + 1] for name, tensor in given.items()}  # type: ignore[index]
        assert_equal(moe_finalize(**alone)[0], expected[token])


@pytest.mark.every_device("moe_finalize")
def test_rounds_once() -> None:
    """bfloat16 cannot hold the partial sums of 1 + 256 * 2^-9."""
    given = arguments(1, 8, torch.bfloat16, top_k=64, num_constant_experts=0, has_residual=False)
    given["rows"] = torch.full((64, 8), 2.0**-7).bfloat16()
    given["slot_rows"] = torch.arange(64, dtype=torch.int32)[None]
    given["topk_weights"] = torch.ones(1, 64)
    given["hidden_states"] = torch.ones(1, 8).bfloat16()
    given["zero_weight"] = torch.ones(1)
    assert_equal(moe_finalize(**given), torch.full((1, 8), 1.5).bfloat16())


@pytest.mark.every_device("moe_finalize")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    given = arguments(7, 57, dtype)
    expected = moe_finalize(**given)
    for name, tensor in given.items():
        assert tensor is not None
        if tensor.dim() == 2:
            for layout, strided in layouts(tensor).items():
                assert_equal(moe_finalize(**{**given, name: strided}), expected, f"{name}, {layout}")
        else:
            assert_equal(moe_finalize(**{**given, name: tensor.repeat_interleave(2)[::2]}), expected, name)


@pytest.mark.every_device("moe_finalize")
def test_many_tokens() -> None:
    """Enough for several threads."""
    given = arguments(600, 200)
    given["rows"] = torch.randn(1800, 200)
    result = moe_finalize(**given)
    part = slice(500, 600)
    shared = ("rows", "constant_vectors")
    later = {name: tensor if name in shared else tensor[part] for name, tensor in given.items()}  # type: ignore[index]
    assert_agrees(result[part], later)


BAD_INPUT: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "integer hidden_states": ({"hidden_states": torch.zeros(3, 8).int()}, r"^hidden_states must be float32, .*int32$"),
    "hidden_states of one dimension": (
        {"hidden_states": torch.zeros(8)},
        r"^hidden_states must have 2 dimensions \[tokens, hidden_size\], got shape \[8\]$",
    ),
    "rows of another type": (
        {"rows": torch.zeros(9, 8).half()},
        r"^rows must be float32 with float32 hidden_states, got float16$",
    ),
    "rows of another width": (
        {"rows": torch.zeros(9, 7)},
        r"^rows must have shape \[9, 8\] \[rows, hidden_size\], got \[9, 7\]$",
    ),
    "rows of three dimensions": ({"rows": torch.zeros(3, 3, 8)}, r"^rows must have 2 dimensions .* \[3, 3, 8\]$"),
    "wide slot_rows": ({"slot_rows": torch.zeros(3, 3).long()}, r"^slot_rows must be int32, got int64$"),
    "slot_rows of other tokens": (
        {"slot_rows": torch.zeros(4, 3).int()},
        r"^slot_rows must have shape \[3, 3\] \[tokens, top_k\], got \[4, 3\]$",
    ),
    "slot_rows of one dimension": ({"slot_rows": torch.zeros(9).int()}, r"^slot_rows must have 2 dimensions .*\[9\]$"),
    "row too large": ({"slot_rows": torch.full((3, 3), 9).int()}, r"^slot_rows must be in \[-1, 9\), got 9$"),
    "row too small": ({"slot_rows": torch.full((3, 3), -2).int()}, r"^slot_rows must be in \[-1, 9\), got -2$"),
    "row where there is none": (
        {"rows": torch.zeros(0, 8), "slot_rows": torch.zeros(3, 3).int()},
        r"^slot_rows must be in \[-1, 0\), got 0$",
    ),
    "topk_weights of another type": (
        {"topk_weights": torch.zeros(3, 3).bfloat16()},
        r"^topk_weights must be float32 with float32 hidden_states, got bfloat16$",
    ),
    "topk_weights of other slots": (
        {"topk_weights": torch.zeros(3, 4)},
        r"^topk_weights must have shape \[3, 3\] \[tokens, top_k\], got \[3, 4\]$",
    ),
    "zero_weight of another type": (
        {"zero_weight": torch.zeros(3).double()},
        r"^zero_weight must be float32 .*float64$",
    ),
    "zero_weight of other tokens": (
        {"zero_weight": torch.zeros(2)},
        r"^zero_weight must have shape \[3\] .*, got \[2\]$",
    ),
    "residual of another type": ({"residual": torch.zeros(3, 8).half()}, r"^residual must be float32 .*, got float16$"),
    "residual of one row": ({"residual": torch.zeros(1, 8)}, r"^residual must have shape \[3, 8\] .*, got \[1, 8\]$"),
    "constant_weight of other tokens": (
        {"constant_weight": torch.zeros(2, 2)},
        r"^constant_weight must have shape \[3, 2\] \[tokens, constant_experts\], got \[2, 2\]$",
    ),
    "constant_weight of other experts": (
        {"constant_weight": torch.zeros(3, 1)},
        r"^constant_weight must have shape \[3, 2\] \[tokens, constant_experts\], got \[3, 1\]$",
    ),
    "constant_weight of another type": (
        {"constant_weight": torch.zeros(3, 2).double()},
        r"^constant_weight must be float32 with float32 hidden_states, got float64$",
    ),
    "constant_vectors of another width": (
        {"constant_vectors": torch.zeros(2, 7)},
        r"^constant_vectors must have shape \[2, 8\] \[constant_experts, hidden_size\], got \[2, 7\]$",
    ),
    "constant_vectors of another type": (
        {"constant_vectors": torch.zeros(2, 8).half()},
        r"^constant_vectors must be float32 with float32 hidden_states, got float16$",
    ),
    "no constant_vectors": (
        {"constant_vectors": None},
        r"^constant_weight of shape \[3, 2\] needs constant_vectors, got None$",
    ),
    "no constant_weight": (
        {"constant_weight": None},
        r"^constant_vectors of shape \[2, 8\] needs constant_weight, got None$",
    ),
    "residual elsewhere": (
        {"residual": torch.zeros(3, 8, device="meta")},
        r"^residual must be on cpu like hidden_states, got meta$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    with pytest.raises(RuntimeError, match=sentence):
        moe_finalize(**{**arguments(), **changes})


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_opcheck(num_tokens: int, dtype: torch.dtype) -> None:
    given = arguments(num_tokens, 19, dtype)
    parts = {name: given.pop(name) for name in PARTS}
    op = torch.ops.zexpert.moe_finalize.default
    torch.library.opcheck(op, tuple(given.values()))
    torch.library.opcheck(op, tuple(given.values()), parts)


def test_compiled() -> None:
    compiled = torch.compile(moe_finalize, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (7, 3, 40):
        given = arguments(num_tokens, 19)
        assert_equal(compiled(**given), moe_finalize(**given))


def test_scripted() -> None:
    def finalize(
        rows: Tensor,
        slot_rows: Tensor,
        topk_weights: Tensor,
        hidden_states: Tensor,
        zero_weight: Tensor,
        residual: Tensor,
    ) -> Tensor:
        return torch.ops.zexpert.moe_finalize(
            rows, slot_rows, topk_weights, hidden_states, zero_weight, residual=residual
        )

    given = arguments(7, 19)
    del given["constant_weight"], given["constant_vectors"]
    assert_equal(torch.jit.script(finalize)(**given), moe_finalize(**given))
