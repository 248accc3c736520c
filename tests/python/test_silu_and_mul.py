# SPDX-License-Identifier: Apache-2.0
"""silu_and_mul against the reference; extreme values, bad input."""

from __future__ import annotations

import pytest
import torch

import reference
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule, layouts, unchanged
from zexpert.ops import silu_and_mul


@pytest.mark.every_device("silu_and_mul")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("intermediate_size", [0, 1, 5, 200, 257])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_against_reference(num_rows: int, intermediate_size: int, dtype: torch.dtype) -> None:
    gate_up = (3.0 * torch.randn(num_rows, 2 * intermediate_size)).to(dtype)
    with unchanged(gate_up):
        result = silu_and_mul(gate_up)
    assert result.dtype == dtype
    assert_error_rule(result, reference.silu_and_mul(gate_up, dtype=dtype), reference.silu_and_mul(gate_up))


@pytest.mark.every_device("silu_and_mul")
@pytest.mark.parametrize("num_rows", [0, 1, 4, 7])
def test_rows_below_the_last_offset(num_rows: int) -> None:
    gate_up = torch.randn(7, 38)
    expected = silu_and_mul(gate_up)
    gate_up[num_rows:] = torch.nan
    expert_offsets = torch.tensor([0, min(2, num_rows), num_rows], dtype=torch.int32)
    result = silu_and_mul(gate_up, expert_offsets)
    assert result.shape == (7, 19)
    assert_equal(result[:num_rows], expected[:num_rows])


@pytest.mark.every_device("silu_and_mul")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    gate_up = torch.randn(7, 58).to(dtype)
    expected = silu_and_mul(gate_up)
    for name, given in layouts(gate_up).items():
        assert_equal(silu_and_mul(given), expected, name)
    assert_equal(silu_and_mul(gate_up[:1].expand(7, 58)), expected[:1].expand(7, 29))
    spread_offsets = torch.tensor([0, 9, 4, 9, 7, 9], dtype=torch.int32)[::2]
    assert_equal(silu_and_mul(gate_up, spread_offsets), expected)


@pytest.mark.every_device("silu_and_mul")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_extreme_gates(dtype: torch.dtype) -> None:
    """exp(-x) that overflows, vanishes, or is not a number."""
    gate = torch.tensor([-3e4, -200.0, -104.0, -89.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 200.0, 3e4]).to(dtype)
    special = torch.tensor([torch.inf, torch.nan]).to(dtype)
    gate_up = torch.cat([gate, special, torch.ones(14, dtype=dtype)])[None]
    result = silu_and_mul(gate_up)
    assert_error_rule(result, reference.silu_and_mul(gate_up, dtype=dtype), reference.silu_and_mul(gate_up))


@pytest.mark.every_device("silu_and_mul")
def test_many_rows() -> None:
    """Enough for several threads."""
    gate_up = torch.randn(2000, 400)
    plain = reference.silu_and_mul(gate_up, dtype=torch.float32)
    assert_error_rule(silu_and_mul(gate_up), plain, reference.silu_and_mul(gate_up))


BAD_INPUT = {
    "integers": (torch.zeros(3, 8).int(), None, r"^gate_up must be float32, float64, bfloat16 or float16, got int32$"),
    "one dimension": (
        torch.zeros(8),
        None,
        r"^gate_up must have 2 dimensions \[rows, 2 \* intermediate_size\], got shape \[8\]$",
    ),
    "odd columns": (torch.zeros(3, 7), None, r"^gate_up must have an even number of columns, got shape \[3, 7\]$"),
    "wide offsets": (torch.zeros(3, 8), torch.zeros(2).long(), r"^expert_offsets must be int32, got int64$"),
    "offsets of two dimensions": (
        torch.zeros(3, 8),
        torch.zeros(1, 2).int(),
        r"^expert_offsets must have 1 dimension .*$",
    ),
    "no offsets": (torch.zeros(3, 8), torch.zeros(0).int(), r"^expert_offsets must have at least 1 element, .*$"),
    "last offset too large": (
        torch.zeros(3, 8),
        torch.tensor([0, 4]).int(),
        r"^expert_offsets must end between 0 and the number of rows \(3\), got 4$",
    ),
    "last offset negative": (torch.zeros(3, 8), torch.tensor([0, -1]).int(), r"^expert_offsets must end .*, got -1$"),
    "offsets elsewhere": (
        torch.zeros(3, 8),
        torch.zeros(2, device="meta").int(),
        r"^expert_offsets must be on cpu like gate_up, got meta$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    gate_up, expert_offsets, sentence = BAD_INPUT[case]
    with pytest.raises(RuntimeError, match=sentence):
        silu_and_mul(gate_up, expert_offsets)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_opcheck(num_rows: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(num_rows, 38).to(dtype)
    op = torch.ops.zexpert.silu_and_mul.default
    torch.library.opcheck(op, (gate_up,))
    torch.library.opcheck(op, (gate_up, torch.tensor([0, num_rows], dtype=torch.int32)))


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(silu_and_mul, fullgraph=True, backend="aot_eager", dynamic=True)
    scripted = torch.jit.script(silu_and_mul)
    for num_rows in (7, 3, 40):
        gate_up = torch.randn(num_rows, 38)
        expert_offsets = torch.tensor([0, num_rows], dtype=torch.int32)
        for function in (compiled, scripted):
            assert_equal(function(gate_up), silu_and_mul(gate_up))
            assert_equal(function(gate_up, expert_offsets), silu_and_mul(gate_up))
