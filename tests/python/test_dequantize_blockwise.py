# SPDX-License-Identifier: Apache-2.0
"""dequantize_blockwise against its definition in plain PyTorch, bit for bit; layouts, bad input."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

import reference
from testing import FLOAT_DTYPES, assert_equal, unchanged
from zexpert import ops

SHAPES = [(1, 1), (3, 5), (128, 128), (2, 129, 127), (1, 300, 260), (2, 2, 130, 64)]

dequantize_blockwise = ops.dequantize_blockwise


def quantised(*shape: int) -> tuple[Tensor, Tensor]:
    """Random codes but NaN, and scales."""
    codes = torch.randint(0, 0x7F, shape, dtype=torch.uint8) + 0x80 * torch.randint(0, 2, shape, dtype=torch.uint8)
    blocks = [(size + 127) // 128 for size in shape[-2:]]
    return codes.view(torch.float8_e4m3fn), torch.rand(*shape[:-2], *blocks)


@pytest.mark.every_device("dequantize_blockwise")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, scale_inv = quantised(*shape)
    with unchanged(scale_inv):
        values = dequantize_blockwise(weight, scale_inv, dtype)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert_equal(values, reference.dequantize_blockwise(weight, scale_inv, computed).to(dtype))


@pytest.mark.every_device("dequantize_blockwise")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_code(dtype: torch.dtype) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    values = dequantize_blockwise(weight, torch.ones(1, 2), dtype)
    assert values.isnan().nonzero()[:, 1].tolist() == [0x7F, 0xFF]
    assert_equal(values.nan_to_num(), weight.to(dtype).nan_to_num())


@pytest.mark.every_device("dequantize_blockwise")
def test_layouts_and_no_elements() -> None:
    weight, scale_inv = quantised(3, 150, 140)
    expected = dequantize_blockwise(weight, scale_inv)
    transposed = weight.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(torch.float8_e4m3fn)
    assert_equal(dequantize_blockwise(transposed, scale_inv.transpose(1, 2).contiguous().transpose(1, 2)), expected)
    twice = torch.cat((weight.view(torch.uint8),) * 2).view(torch.float8_e4m3fn)
    assert_equal(dequantize_blockwise(twice[1::2], torch.cat((scale_inv,) * 2)[1::2]), expected[[1, 0, 2]])
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        weight = torch.zeros(shape, dtype=torch.float8_e4m3fn)
        blocks = [min(size, 1) for size in shape[1:]]
        assert dequantize_blockwise(weight, torch.zeros(shape[0], *blocks)).shape == shape


@pytest.mark.every_device("dequantize_blockwise")
def test_the_inverse_of_quantize_blockwise() -> None:
    """An error of at most half a step: 1/16 of a number, or half of the smallest number, 2^-10 of the scale."""
    weight = torch.randn(2, 200, 300)
    codes, scale_inv = ops.quantize_blockwise(weight)
    values = dequantize_blockwise(codes, scale_inv, torch.float64)
    scales = reference.dequantize_blockwise(torch.ones_like(weight).to(torch.float8_e4m3fn), scale_inv)
    bound = torch.maximum(weight.abs().double() / 16, scales * 2.0**-10) * (1 + 1e-6)
    assert bool(((values - weight).abs() <= bound).all())


def test_bad_input() -> None:
    weight, scale_inv = quantised(2, 150, 140)
    with pytest.raises(RuntimeError, match=r"^weight must be float8_e4m3fn, got float8_e5m2$"):
        dequantize_blockwise(weight.float().to(torch.float8_e5m2), scale_inv)
    with pytest.raises(RuntimeError, match=r"^scale_inv must be float32, got float16$"):
        dequantize_blockwise(weight, scale_inv.half())
    with pytest.raises(RuntimeError, match=r"^scale_inv must have shape \[2, 2, 2\] .*, got \[2, 2, 1\]$"):
        dequantize_blockwise(weight, scale_inv[:, :, :1])
    with pytest.raises(RuntimeError, match=r"^scale_inv must have the leading dimensions of weight \(\[2\]\)"):
        dequantize_blockwise(weight, scale_inv[0])
    with pytest.raises(RuntimeError, match=r"^weight must have at least 2 dimensions .*, got shape \[4\]$"):
        dequantize_blockwise(torch.zeros(4, dtype=torch.float8_e4m3fn), torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"^dtype must be float32, float64, bfloat16 or float16, got int32$"):
        dequantize_blockwise(weight, scale_inv, torch.int32)
    with pytest.raises(RuntimeError, match="cannot be differentiated: it computes forward only"):
        dequantize_blockwise(weight, scale_inv.requires_grad_()).sum().backward()


def test_opcheck_compiled_and_scripted() -> None:
    given = quantised(2, 130, 70)
    # Not test_schema: PyTorch compares no float8 tensors on the CPU.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.zexpert.dequantize_blockwise.default
    torch.library.opcheck(op, given, {"dtype": torch.bfloat16}, test_utils=checks)
    expected = dequantize_blockwise(*given)
    assert_equal(torch.compile(dequantize_blockwise, fullgraph=True)(*given), expected)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(dequantize_blockwise), file)
    file.seek(0)
    assert_equal(torch.jit.load(file)(*given, torch.bfloat16), expected)
