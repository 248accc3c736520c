# SPDX-License-Identifier: Apache-2.0
"""biased_topk: layouts, bad input, dispatcher, torch.compile and TorchScript."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from testing import FLOAT_DTYPES, assert_equal, layouts, random_logits, unchanged
from zexpert.ops import RoutingResult, biased_topk, grouped_mlp

EVERY_KIND = {
    "num_real_experts": 16,
    "num_identity_experts": 4,
    "num_constant_experts": 3,
    "renormalize": True,
    "drop_before_renormalize": True,
    "routed_scaling_factor": 2.5,
    "num_expert_group": 4,
    "topk_group": 2,
}


@pytest.mark.every_device("biased_topk")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_layouts_of_logits(dtype: torch.dtype) -> None:
    logits = random_logits(7, 97, dtype)
    expected = biased_topk(logits, None, 5, num_real_experts=64)
    for name, given in layouts(logits).items():
        for one, other in zip(biased_topk(given, None, 5, num_real_experts=64), expected, strict=True):
            assert_equal(one, other, name)


@pytest.mark.every_device("biased_topk")
def test_layouts_of_bias() -> None:
    logits = random_logits(7, 96)
    bias = 0.01 * torch.randn(96)
    expected = biased_topk(logits, bias, 5, num_real_experts=64)
    for given in (bias.repeat_interleave(2)[::2], torch.stack([bias] * 3, dim=1)[:, 1]):
        assert not given.is_contiguous()
        for one, other in zip(biased_topk(logits, given, 5, num_real_experts=64), expected, strict=True):
            assert_equal(one, other)


@pytest.mark.every_device("biased_topk")
def test_expanded_logits() -> None:
    row = random_logits(1, 96)
    result = biased_topk(row.expand(5, 96), None, 5, num_real_experts=64)
    for field, field_of_row in zip(result, biased_topk(row, None, 5, num_real_experts=64), strict=True):
        assert_equal(field, field_of_row.expand_as(field))
    level = torch.zeros(1, 1).expand(3, 96)
    assert_equal(biased_topk(level, None, 2, num_real_experts=64).topk_ids, torch.tensor([[0, 1]] * 3).int())


@pytest.mark.every_device("biased_topk")
def test_misaligned_logits() -> None:
    """Rows that begin at every offset from a vector's natural alignment."""
    memory = random_logits(1, 7 * 99 + 16).flatten()
    for offset in range(16):
        logits = memory[offset : offset + 7 * 99].reshape(7, 99)
        expected = biased_topk(logits.clone(), None, 5, num_real_experts=64)
        for one, other in zip(biased_topk(logits, None, 5, num_real_experts=64), expected, strict=True):
            assert_equal(one, other)


BAD_INPUT = {
    "one dimension": (
        {"logits": torch.zeros(8)},
        r"^logits must have 2 dimensions \[tokens, experts\], got shape \[8\]$",
    ),
    "three dimensions": (
        {"logits": torch.zeros(2, 3, 8)},
        r"^logits must have 2 dimensions .*, got shape \[2, 3, 8\]$",
    ),
    "integer logits": (
        {"logits": torch.zeros(3, 8, dtype=torch.int64)},
        r"^logits must be float32, float64, bfloat16 or float16, got int64$",
    ),
    "complex logits": (
        {"logits": torch.zeros(3, 8, dtype=torch.complex64)},
        r"^logits must be float32, .* got complex64$",
    ),
    "no experts": (
        {"logits": torch.zeros(3, 0)},
        r"^num_logits \(the width of the logits\) must be at least 6, .*got 0$",
    ),
    "too few columns": ({"num_real_experts": 9}, r"^num_logits .* must be at least 9, .* got 8$"),
    "bias too long": ({"bias": torch.zeros(9)}, r"^bias must have shape \[8\] \[experts\], got \[9\]$"),
    "bias of two dimensions": (
        {"bias": torch.zeros(1, 8)},
        r"^bias must have 1 dimension \[experts\], got shape \[1, 8\]$",
    ),
    "bias of one element": ({"bias": torch.zeros(1)}, r"^bias must have shape \[8\] \[experts\], got \[1\]$"),
    "integer bias": ({"bias": torch.zeros(8, dtype=torch.int32)}, r"^bias must be float32, .*, got int32$"),
    "bias elsewhere": ({"bias": torch.zeros(8, device="meta")}, r"^bias must be on cpu like logits, got meta$"),
    "no slots": ({"top_k": 0}, r"^top_k must be between 1 and 64, got 0$"),
    "negative slots": ({"top_k": -3}, r"^top_k must be between 1 and 64, got -3$"),
    "too many slots": ({"top_k": 65, "logits": torch.zeros(1, 99)}, r"^top_k must be between 1 and 64, got 65$"),
    "more slots than experts": ({"top_k": 9}, r"^top_k must be at most the number of experts \(8\), got 9$"),
    "no real experts": ({"num_real_experts": 0}, r"^num_real_experts must be at least 1, got 0$"),
    "negative identity experts": ({"num_identity_experts": -1}, r"^num_identity_experts must not be negative, got -1$"),
    "negative constant experts": ({"num_constant_experts": -1}, r"^num_constant_experts must not be negative, got -1$"),
    "too many identity experts": ({"num_identity_experts": 3}, r"^num_logits .* must be at least 9, .* got 8$"),
    "too many constant experts": ({"num_constant_experts": 3}, r"^num_logits .* must be at least 9, .* got 8$"),
    "scoring function": ({"scoring_func": "tanh"}, r'^scoring_func must be "softmax", "sigmoid" or .*, got "tanh"$'),
    "infinite scale": ({"routed_scaling_factor": float("inf")}, r"^routed_scaling_factor must be finite.*, got inf$"),
    "scale beyond float32": ({"routed_scaling_factor": 1e39}, r"^routed_scaling_factor must be finite.*, got 1e\+39$"),
    "groups that do not divide": (
        {"num_expert_group": 4},
        r"^num_expert_group must divide the number of real experts \(6\), got 4$",
    ),
    "no groups": ({"num_expert_group": 0}, r"^num_expert_group must divide .*, got 0$"),
    "too many eligible groups": (
        {"num_expert_group": 3, "topk_group": 4},
        r"^topk_group must be between 1 and num_expert_group \(3\), got 4$",
    ),
    "no eligible group": ({"num_expert_group": 3, "topk_group": 0}, r"^topk_group must be between 1 and .*, got 0$"),
    "ids of no dtype": ({"indices_dtype": 99}, r"^indices_dtype must be int32 or int64, got 99$"),
    "ids of 16 bits": ({"indices_dtype": torch.int16}, r"^indices_dtype must be int32 or int64, got int16$"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    arguments = {"logits": random_logits(3, 8), "bias": None, "top_k": 2, "num_real_experts": 6, **changes}
    logits, bias, top_k = (arguments.pop(name) for name in ("logits", "bias", "top_k"))
    with unchanged(logits), pytest.raises(RuntimeError, match=sentence):
        biased_topk(logits, bias, top_k, **arguments)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_without_tokens(case: str) -> None:
    """Having nothing to do does not excuse bad input."""
    changes, _ = BAD_INPUT[case]
    arguments = {"logits": random_logits(3, 8), "bias": None, "top_k": 2, "num_real_experts": 6, **changes}
    logits, bias, top_k = (arguments.pop(name) for name in ("logits", "bias", "top_k"))
    with pytest.raises(RuntimeError):
        biased_topk(logits[:0] if logits.dim() != 1 else logits, bias, top_k, **arguments)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, indices_dtype: torch.dtype, num_tokens: int) -> None:
    logits = random_logits(num_tokens, 25, dtype)
    keywords = {**EVERY_KIND, "indices_dtype": indices_dtype}
    torch.library.opcheck(torch.ops.zexpert.biased_topk.default, (logits, torch.randn(25), 5), keywords)


def test_compiled() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def route(logits: Tensor, bias: Tensor) -> RoutingResult:
        return biased_topk(logits, bias, 5, **EVERY_KIND)

    bias = 0.01 * torch.randn(25)
    for num_tokens in (7, 3, 64):
        logits = random_logits(num_tokens, 25)
        for one, other in zip(route(logits, bias), biased_topk(logits, bias, 5, **EVERY_KIND), strict=True):
            assert_equal(one, other)


def test_scripted() -> None:
    def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.zexpert.biased_topk(
            logits,
            bias,
            5,
            num_real_experts=16,
            num_constant_experts=3,
            num_identity_experts=4,
            scoring_func="sigmoid",
            indices_dtype=torch.int64,
        )

    scripted = torch.jit.script(route)
    logits = random_logits(7, 25)
    for bias in (None, torch.randn(25)):
        for one, other in zip(scripted(logits, bias), route(logits, bias), strict=True):
            assert_equal(one, other)
    with pytest.raises(RuntimeError, match=r"logits must have 2 dimensions"):
        scripted(logits[0], None)


def test_meta_tensors_give_shapes() -> None:
    result = biased_topk(torch.empty(9, 25, device="meta", dtype=torch.bfloat16), None, 5, **EVERY_KIND)
    assert [(tuple(field.shape), field.dtype) for field in result] == [
        ((9, 5), torch.float32),
        ((9, 5), torch.int32),
        ((9,), torch.float32),
        ((9, 3), torch.float32),
    ]


@pytest.mark.every_device("biased_topk")
def test_inputs_that_require_gradients() -> None:
    """Logits and a bias that are part of a graph route as any others do."""
    logits = random_logits(7, 25)
    bias = 0.01 * torch.randn(25)
    expected = biased_topk(logits, bias, 5, **EVERY_KIND)
    tracked = layouts(logits)["transposed"].detach().requires_grad_()
    result = biased_topk(tracked * 1.0, bias.clone().requires_grad_(), 5, **EVERY_KIND)
    for one, other in zip(result, expected, strict=True):
        assert_equal(one.detach(), other)


def test_dropping_before_nothing_is_divided() -> None:
    """Refused where it would have no effect, also where only the logits tell how many drop experts there are."""
    for routing, message in (
        ({"num_identity_experts": 1}, r"^drop_before_renormalize needs renormalize, got false$"),
        ({"renormalize": True}, r"^drop_before_renormalize needs drop experts, got none: num_identity_experts must be"),
        ({"renormalize": True, "num_identity_experts": 4}, r"^drop_before_renormalize needs drop experts, got none of"),
    ):
        with pytest.raises(RuntimeError, match=message):
            biased_topk(torch.zeros(2, 8), None, 2, num_real_experts=4, drop_before_renormalize=True, **routing)


def test_too_large_a_dense_copy() -> None:
    """Logits and weights that the kernels cannot read in place, and that no memory can hold."""
    with pytest.raises(
        RuntimeError, match=r"^could not allocate a tensor of shape \[1073741824, 4194304\] of float32 on cpu$"
    ):
        biased_topk(torch.zeros(1, 1).expand(2**30, 2**22), None, 1, num_real_experts=2**22)
    weights = torch.zeros(1, 1, 1).expand(8, 2**41, 8), torch.zeros(1, 1, 1).expand(8, 8, 2**40)
    with pytest.raises(
        RuntimeError, match=r"^could not allocate a tensor of shape \[8, 2199023255552, 8\] of float32 on cpu$"
    ):
        grouped_mlp(torch.zeros(0, 8), torch.zeros(9, dtype=torch.int32), *weights)
