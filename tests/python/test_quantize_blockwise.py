# SPDX-License-Identifier: Apache-2.0
"""quantize_blockwise against its definition in plain PyTorch, bit for bit; layouts, extreme values, bad input."""

from __future__ import annotations

import io

import pytest
import torch

import reference
from testing import FLOAT_DTYPES, assert_equal, unchanged
from zexpert import ops

# Below, at and above a block and a vector of it.
SHAPES = [(1, 1), (3, 5), (128, 128), (2, 129, 127), (1, 300, 260), (2, 2, 130, 64)]

quantize_blockwise = ops.quantize_blockwise


@pytest.mark.every_device("quantize_blockwise")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    with unchanged(weight):
        quantised, scale_inv = quantize_blockwise(weight)
    expected, expected_scale_inv = reference.quantize_blockwise(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert quantised.shape == shape
    assert_equal(scale_inv, expected_scale_inv)
    assert_equal(quantised.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.every_device("quantize_blockwise")
@pytest.mark.cpu_paths
def test_every_rounding() -> None:
    """With a scale of 1: every float8 number, the ties between neighbours, and what is next to the ties."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[:-1] + codes[1:]) / 2
    tensors = (codes, ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(448.0)))
    values = torch.cat(tensors)
    weight = torch.stack((values, -values, torch.full_like(values, 448.0)))
    quantised, scale_inv = quantize_blockwise(weight)
    assert_equal(scale_inv, torch.ones_like(scale_inv))
    assert_equal(quantised.view(torch.uint8), weight.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.every_device("quantize_blockwise")
def test_blocks_of_zeros_and_of_tiny_weights() -> None:
    weight = torch.zeros(128, 512)
    weight[0, 128] = -1e-42  # subnormal
    weight[0, 256] = 2.0**-126
    weight[0, 384] = 3e38
    quantised, scale_inv = quantize_blockwise(weight)
    assert scale_inv[0, :3].tolist() == [1.0, 2.0**-126, 2.0**-126]
    assert quantised[0, ::128].tolist() == [0.0, 0.0, 1.0, 448.0]


@pytest.mark.every_device("quantize_blockwise")
def test_layouts_and_no_elements() -> None:
    weight = torch.randn(3, 150, 140)
    expected = quantize_blockwise(weight)
    for given in (weight.transpose(1, 2).contiguous().transpose(1, 2), torch.randn(5, 150, 140)[::2].copy_(weight)):
        for one, other in zip(quantize_blockwise(given), expected, strict=True):
            assert_equal(one.float(), other.float())
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        quantised, scale_inv = quantize_blockwise(torch.zeros(shape))
        assert quantised.shape == shape
        assert scale_inv.numel() == 0


def test_bad_input() -> None:
    with pytest.raises(
        RuntimeError, match=r"^weight must be float32, float64, bfloat16 or float16, got float8_e4m3fn$"
    ):
        quantize_blockwise(torch.zeros(2, 2, dtype=torch.float8_e4m3fn))
    with pytest.raises(RuntimeError, match=r"^weight must have at least 2 dimensions .*, got shape \[4\]$"):
        quantize_blockwise(torch.zeros(4))
    for value in ("nan", "inf", "-inf"):
        weight = torch.zeros(200, 200)
        weight[150, 3] = float(value)
        with pytest.raises(RuntimeError, match=rf"^weight must be finite, got {value.removeprefix('-')}$"):
            quantize_blockwise(weight)
    with pytest.raises(RuntimeError, match="cannot be differentiated: it computes forward only"):
        quantize_blockwise(torch.zeros(2, 2, requires_grad=True))[1].sum().backward()


def test_opcheck_compiled_and_scripted() -> None:
    weight = torch.randn(2, 130, 70)
    torch.library.opcheck(torch.ops.zexpert.quantize_blockwise.default, (weight,))
    expected = [tensor.float() for tensor in quantize_blockwise(weight)]
    compiled = torch.compile(quantize_blockwise, fullgraph=True)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(quantize_blockwise), file)
    file.seek(0)
    for function in (compiled, torch.jit.load(file)):
        for one, other in zip(function(weight), expected, strict=True):
            assert_equal(one.float(), other)
