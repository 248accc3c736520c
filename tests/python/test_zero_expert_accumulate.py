# SPDX-License-Identifier: Apache-2.0
"""zero_expert_accumulate against the reference, new and into a given tensor; aliasing, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule, layouts, unchanged, weight_dtype
from zexpert.ops import zero_expert_accumulate


def inputs(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    zero_weight = torch.rand(num_tokens, dtype=weight_dtype(dtype))
    zero_weight[::3] = 0.0
    return torch.randn(num_tokens, hidden_size).to(dtype), zero_weight


@pytest.mark.every_device("zero_expert_accumulate")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [0, 1, 5, 200, 257])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_against_reference(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    hidden_states, zero_weight = inputs(num_tokens, hidden_size, dtype)
    with unchanged(hidden_states, zero_weight):
        result = zero_expert_accumulate(hidden_states, zero_weight)
    assert result.dtype == dtype
    plain = reference.zero_expert_accumulate(hidden_states, zero_weight, dtype=dtype)
    assert_error_rule(result, plain, reference.zero_expert_accumulate(hidden_states, zero_weight))

    out = torch.randn(num_tokens, hidden_size).to(dtype)
    before = out.clone()
    assert zero_expert_accumulate(hidden_states, zero_weight, out) is out
    plain = reference.zero_expert_accumulate(hidden_states, zero_weight, before, dtype=dtype)
    assert_error_rule(out, plain, reference.zero_expert_accumulate(hidden_states, zero_weight, before))


@pytest.mark.every_device("zero_expert_accumulate")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    hidden_states, zero_weight = inputs(7, 57, dtype)
    expected = zero_expert_accumulate(hidden_states, zero_weight)
    for name, given in layouts(hidden_states).items():
        assert_equal(zero_expert_accumulate(given, zero_weight), expected, name)
    assert_equal(zero_expert_accumulate(hidden_states, zero_weight.repeat_interleave(2)[::2]), expected)
    one_weight = zero_weight[1:2].expand(7)
    assert_equal(
        zero_expert_accumulate(hidden_states[:1].expand(7, 57), one_weight),
        zero_expert_accumulate(hidden_states[:1], one_weight[:1]).expand(7, 57),
    )


@pytest.mark.every_device("zero_expert_accumulate")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_out_with_a_row_stride_leaves_what_lies_between_rows(dtype: torch.dtype) -> None:
    hidden_states, zero_weight = inputs(7, 57, dtype)
    wide = torch.randn(7, 64).to(dtype)
    before = wide.clone()
    expected = before[:, 3:60].contiguous()
    zero_expert_accumulate(hidden_states, zero_weight, expected)
    zero_expert_accumulate(hidden_states, zero_weight, wide[:, 3:60])
    assert_equal(wide[:, 3:60].contiguous(), expected)
    assert_equal(wide[:, :3], before[:, :3])
    assert_equal(wide[:, 60:], before[:, 60:])


@pytest.mark.every_device("zero_expert_accumulate")
def test_out_that_shares_memory_with_the_inputs() -> None:
    hidden_states, zero_weight = inputs(8, 64, torch.float32)
    expected = hidden_states.clone()
    zero_expert_accumulate(hidden_states, zero_weight, expected)

    same = hidden_states.clone()
    zero_expert_accumulate(same, zero_weight, same)
    assert_equal(same, expected, "out is hidden_states")

    memory = torch.cat([hidden_states, torch.zeros(1, 64)])
    shifted = memory[1:].clone()
    zero_expert_accumulate(hidden_states, zero_weight, shifted)
    zero_expert_accumulate(memory[:-1], zero_weight, memory[1:])
    assert_equal(memory[1:], shifted, "out is hidden_states one row further")

    square = torch.randn(8, 8)
    aside = square.clone()
    zero_expert_accumulate(square.t().clone(), square[3].clone(), aside)
    zero_expert_accumulate(square.t(), square[3], square)
    assert_equal(square, aside, "out is hidden_states transposed and holds zero_weight")


@pytest.mark.every_device("zero_expert_accumulate")
def test_many_rows() -> None:
    """Enough for several threads."""
    hidden_states, zero_weight = inputs(3000, 200, torch.float32)
    assert_equal(zero_expert_accumulate(hidden_states, zero_weight), zero_weight[:, None] * hidden_states)


@pytest.mark.every_device("zero_expert_accumulate")
def test_values_that_are_not_finite() -> None:
    hidden_states = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]]).expand(3, 4)
    zero_weight = torch.tensor([0.0, 2.0, torch.nan])
    assert_equal(zero_expert_accumulate(hidden_states, zero_weight), zero_weight[:, None] * hidden_states)


def freed(num_tokens: int, hidden_size: int, first_token: int = 0) -> Tensor:
    """The tokens from the first on of a tensor whose storage has been freed."""
    tensor = torch.zeros(first_token + num_tokens, hidden_size)[first_token:]
    tensor.untyped_storage().resize_(0)
    return tensor


def arguments(**changes: Any) -> dict[str, Any]:
    hidden_states, zero_weight = inputs(3, 8, torch.float32)
    return {"hidden_states": hidden_states, "zero_weight": zero_weight, **changes}


BAD_INPUT = {
    "integer hidden_states": (
        {"hidden_states": torch.zeros(3, 8).long()},
        r"^hidden_states must be float32, float64, bfloat16 or float16, got int64$",
    ),
    "hidden_states of three dimensions": (
        {"hidden_states": torch.zeros(1, 3, 8)},
        r"^hidden_states must have 2 dimensions \[tokens, hidden_size\], got shape \[1, 3, 8\]$",
    ),
    "zero_weight None": ({"zero_weight": None}, r"^zero_weight must be a tensor, got None$"),
    "hidden_states None": ({"hidden_states": None}, r"^hidden_states must be a tensor, got None$"),
    "hidden_states without memory": (
        {"hidden_states": freed(3, 8)},
        r"^hidden_states must have memory, got a tensor whose storage has been freed, of shape \[3, 8\]$",
    ),
    "a part of a tensor without memory": (
        {"hidden_states": freed(3, 8, first_token=1)},
        r"^hidden_states must have memory, got a tensor whose storage has been freed, of shape \[3, 8\]$",
    ),
    "out without memory": (
        {"out": freed(3, 8)},
        r"^out must have memory, got a tensor whose storage has been freed, of shape \[3, 8\]$",
    ),
    "zero_weight too short": (
        {"zero_weight": torch.zeros(2)},
        r"^zero_weight must have shape \[3\] \[tokens\], got \[2\]$",
    ),
    "zero_weight of two dimensions": (
        {"zero_weight": torch.zeros(3, 1)},
        r"^zero_weight must have 1 dimension \[tokens\], got shape \[3, 1\]$",
    ),
    "zero_weight of the data's type": (
        {"hidden_states": torch.zeros(3, 8).bfloat16(), "zero_weight": torch.zeros(3).bfloat16()},
        r"^zero_weight must be float32 with bfloat16 hidden_states, got bfloat16$",
    ),
    "narrow zero_weight": (
        {"hidden_states": torch.zeros(3, 8).double()},
        r"^zero_weight must be float64 with float64 hidden_states, got float32$",
    ),
    "zero_weight elsewhere": (
        {"zero_weight": torch.zeros(3, device="meta")},
        r"^zero_weight must be on cpu like hidden_states, got meta$",
    ),
    "out of another type": (
        {"out": torch.zeros(3, 8).half()},
        r"^out must be float32 with float32 hidden_states, got float16$",
    ),
    "out of another shape": (
        {"out": torch.zeros(3, 9)},
        r"^out must have shape \[3, 8\] \[tokens, hidden_size\], got \[3, 9\]$",
    ),
    "out of one dimension": ({"out": torch.zeros(24)}, r"^out must have 2 dimensions .*, got shape \[24\]$"),
    "out transposed": (
        {"out": torch.zeros(8, 3).t()},
        r"^out must have an inner stride of 1 and rows that do not overlap, got shape \[3, 8\] with strides \[1, 3\]$",
    ),
    "out expanded": (
        {"out": torch.zeros(1, 8).expand(3, 8)},
        r"^out must have an inner stride of 1 and rows that do not overlap, .* with strides \[0, 1\]$",
    ),
    "out of overlapping rows": (
        {"out": torch.zeros(30).as_strided((3, 8), (4, 1))},
        r"^out must have an inner stride of 1 and rows that do not overlap, .* with strides \[4, 1\]$",
    ),
    "out elsewhere": ({"out": torch.zeros(3, 8, device="meta")}, r"^out must be on cpu like hidden_states, got meta$"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    given = arguments(**changes)
    on_cpu = [
        tensor
        for tensor in given.values()
        if tensor is not None and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() > 0
    ]
    with unchanged(*on_cpu), pytest.raises(RuntimeError, match=sentence):
        zero_expert_accumulate(**given)


def test_a_backward_that_would_read_what_was_there_before_is_refused() -> None:
    hidden_states, zero_weight = inputs(3, 8, torch.float32)
    leaf = torch.randn(3, 8, requires_grad=True)
    saved_for_backward = leaf.exp()
    with torch.no_grad():
        zero_expert_accumulate(hidden_states, zero_weight, saved_for_backward)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved_for_backward.sum().backward()


def test_too_large_a_result() -> None:
    with pytest.raises(
        RuntimeError, match=r"^could not allocate a tensor of shape \[1099511627776, 1024\] of float32 on cpu$"
    ):
        zero_expert_accumulate(torch.zeros(1).expand(2**40, 1024), torch.zeros(1).expand(2**40))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_opcheck(num_tokens: int, dtype: torch.dtype) -> None:
    hidden_states, zero_weight = inputs(num_tokens, 19, dtype)
    op = torch.ops.zexpert.zero_expert_accumulate
    torch.library.opcheck(op.default, (hidden_states, zero_weight))
    torch.library.opcheck(op.out, (hidden_states, zero_weight), {"out": torch.randn(num_tokens, 19).to(dtype)})


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(zero_expert_accumulate, fullgraph=True, backend="aot_eager", dynamic=True)
    scripted = torch.jit.script(zero_expert_accumulate)
    for num_tokens in (7, 3, 40):
        hidden_states, zero_weight = inputs(num_tokens, 19, torch.float32)
        expected = zero_weight[:, None] * hidden_states
        for function in (compiled, scripted):
            assert_equal(function(hidden_states, zero_weight), expected)
            out = torch.zeros(num_tokens, 19)
            assert_equal(function(hidden_states, zero_weight, out), expected)
            assert_equal(out, expected)
