# SPDX-License-Identifier: Apache-2.0
"""router_logits against float64: accuracy, choices, independence of the batch, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from testing import FLOAT_DTYPES, assert_equal, assert_error_rule, layouts, unchanged
from zexpert.ops import router_logits

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def skip_float64_on_cuda(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("on CUDA hidden states are not float64")


def reference(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return hidden_states.double() @ weight.double().t()


def plain(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Every product rounded once and added in one float32 sum, in the order of depth."""
    total = torch.zeros(hidden_states.shape[0], weight.shape[0])
    for h in range(weight.shape[1]):
        total += hidden_states[:, h, None].float() * weight[:, h].float()
    return total


# Widths of a vector and of one more, depths that are whole steps of the kernels or not, tokens around the tiles' edges.
@pytest.mark.every_device("router_logits")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden_size", "num_experts"), [(1, 1), (64, 8), (192, 13), (200, 33), (257, 70), (1032, 130)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 9, 33, 130])
def test_against_float64(num_tokens: int, hidden_size: int, num_experts: int, dtype: torch.dtype, device: str) -> None:
    skip_float64_on_cuda(dtype, device)
    hidden_states = torch.randn(num_tokens, hidden_size).to(dtype)
    weight = torch.randn(num_experts, hidden_size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with unchanged(hidden_states, weight):
        logits = router_logits(hidden_states, weight)
    assert logits.dtype == weight.dtype
    assert_error_rule(logits, plain(hidden_states, weight), reference(hidden_states, weight))


@pytest.mark.every_device("router_logits")
@pytest.mark.parametrize(("hidden_size", "num_experts"), [(2048, 192), (3072, 384), (6144, 768), (7168, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_models_sizes(hidden_size: int, num_experts: int, dtype: torch.dtype) -> None:
    weight = 0.02 * torch.randn(num_experts, hidden_size)
    hidden_states = torch.randn(24, hidden_size).to(dtype)
    expected = reference(hidden_states, weight)
    logits = router_logits(hidden_states, weight)
    assert_error_rule(logits, plain(hidden_states, weight), expected)
    choices = logits.topk(12).indices.sort().values
    assert_equal(choices, expected.topk(12).indices.sort().values)


@pytest.mark.every_device("router_logits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_near_ties(dtype: torch.dtype) -> None:
    """Of two experts whose logits nearly tie, the larger is found about as often as by a float32 sum."""
    hidden_states = torch.randn(64, 3072).to(dtype)
    one = 0.02 * torch.randn(128, 3072)
    weight = torch.cat([one, one * (1 + 2e-6 * torch.randn(128, 3072))])

    def first_wins(logits: Tensor) -> Tensor:
        return logits[:, :128] > logits[:, 128:]

    expected = first_wins(reference(hidden_states, weight))
    found = int((first_wins(router_logits(hidden_states, weight)) == expected).sum())
    found_by_plain = int((first_wins(plain(hidden_states, weight)) == expected).sum())
    assert found >= found_by_plain - 3 * (64 * 128) ** 0.5  # over three standard deviations of a count


@pytest.mark.every_device("router_logits")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [200, 1024, 6144])
def test_a_token_does_not_depend_on_the_batch(hidden_size: int, dtype: torch.dtype, device: str) -> None:
    skip_float64_on_cuda(dtype, device)
    weight = torch.randn(40, hidden_size)
    hidden_states = torch.randn(600, hidden_size).to(dtype)
    logits = router_logits(hidden_states, weight)
    assert_equal(router_logits(hidden_states, weight), logits)
    for begin, end in [(0, 1), (5, 7), (599, 600), (17, 26), (0, 64), (3, 131), (40, 300)]:
        assert_equal(router_logits(hidden_states[begin:end], weight), logits[begin:end], f"tokens {begin} to {end}")
    assert_equal(router_logits(hidden_states, weight[7:20]), logits[:, 7:20])


@pytest.mark.every_device("router_logits")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [3, 150])
def test_a_token_that_is_not_finite(num_tokens: int, dtype: torch.dtype, value: float) -> None:
    weight = torch.randn(10, 128)
    hidden_states = torch.randn(num_tokens, 128).to(dtype)
    logits = router_logits(hidden_states, weight)
    hidden_states[1, 70] = value
    changed = router_logits(hidden_states, weight)
    assert not changed[1].isfinite().any()
    assert_equal(changed[::2], logits[::2])


@pytest.mark.every_device("router_logits")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, device: str) -> None:
    skip_float64_on_cuda(dtype, device)
    hidden_states = torch.randn(6, 64).to(dtype)
    weight = torch.randn(9, 64)
    expected = router_logits(hidden_states, weight)
    for name, given in layouts(hidden_states).items():
        assert_equal(router_logits(given, weight), expected, name)
    for name, given in layouts(weight).items():
        assert_equal(router_logits(hidden_states, given), expected, f"weight, {name}")
    assert_equal(router_logits(hidden_states[:1].expand(6, 64), weight), expected[:1].expand(6, 9))
    assert_equal(router_logits(hidden_states.view(2, 3, 64), weight), expected.view(2, 3, 9))
    assert_equal(router_logits(hidden_states.view(3, 2, 64).transpose(0, 1)[1], weight), expected[1::2])
    assert_equal(router_logits(hidden_states[2], weight), expected[2])


@pytest.mark.every_device("router_logits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_lower_precision(dtype: torch.dtype) -> None:
    hidden_states = torch.randn(5, 64).bfloat16()
    weight = torch.randn(9, 64).to(dtype)
    assert_equal(router_logits(hidden_states, weight), router_logits(hidden_states, weight.float()))


@pytest.mark.every_device("router_logits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e3, 1e25])
def test_weights_of_any_magnitude(scale: float, dtype: torch.dtype) -> None:
    """Also of magnitudes that 16 bits do not hold, and that differ from expert to expert."""
    hidden_states = torch.randn(300, 256).to(dtype)  # so many that plain PyTorch's largest error is no matter of luck
    weight = scale * torch.randn(9, 256) * torch.logspace(-4, 4, 9)[:, None]
    logits = router_logits(hidden_states, weight)
    for expert in range(9):
        one = weight[expert : expert + 1]
        assert_error_rule(logits[:, expert, None], plain(hidden_states, one), reference(hidden_states, one))


@pytest.mark.every_device("router_logits")
def test_empty() -> None:
    assert_equal(router_logits(torch.zeros(3, 0), torch.zeros(4, 0)), torch.zeros(3, 4))
    assert router_logits(torch.zeros(3, 5), torch.zeros(0, 5)).shape == (3, 0)
    assert router_logits(torch.zeros(2, 0, 5), torch.zeros(4, 5)).shape == (2, 0, 4)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradcheck(needs: tuple[bool, bool]) -> None:
    hidden_states = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=needs[0])
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=needs[1])
    assert torch.autograd.gradcheck(router_logits, (hidden_states, weight))
    assert torch.autograd.gradgradcheck(router_logits, (hidden_states, weight))


@pytest.mark.every_device("router_logits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    hidden_states = torch.randn(7, 64).to(dtype).requires_grad_()
    weight = torch.randn(9, 64, requires_grad=True)
    upstream = torch.randn(7, 9)
    router_logits(hidden_states, weight).backward(upstream)
    assert hidden_states.grad is not None
    assert weight.grad is not None
    assert hidden_states.grad.dtype == dtype
    expected = upstream.double() @ weight.detach().double()
    assert_error_rule(hidden_states.grad, (upstream @ weight.detach()).to(dtype), expected)
    rows = hidden_states.detach()
    assert_error_rule(weight.grad, upstream.t() @ rows.float(), upstream.double().t() @ rows.double())


BAD_INPUT = {
    "integers": (
        torch.zeros(3, 8).int(),
        torch.zeros(4, 8),
        r"^hidden_states must be float32, float64, bfloat16 or float16, got int32$",
    ),
    "wide weight": (
        torch.zeros(3, 8),
        torch.zeros(4, 8).double(),
        r"^weight must be float32, bfloat16 or float16 with float32 hidden_states, got float64$",
    ),
    "integer weight": (
        torch.zeros(3, 8).double(),
        torch.zeros(4, 8).long(),
        r"^weight must be float32, float64, bfloat16 or float16 with float64 hidden_states, got int64$",
    ),
    "no dimension": (
        torch.zeros(()),
        torch.zeros(4, 1),
        r"^hidden_states must have at least 1 dimension \[\.\.\., hidden_size\], got shape \[\]$",
    ),
    "weight of one dimension": (
        torch.zeros(3, 8),
        torch.zeros(8),
        r"^weight must have 2 dimensions \[experts, hidden_size\], got shape \[8\]$",
    ),
    "weight of another width": (
        torch.zeros(3, 8),
        torch.zeros(4, 9),
        r"^weight must have shape \[4, 8\] \[experts, hidden_size\], got \[4, 9\]$",
    ),
    "weight elsewhere": (
        torch.zeros(3, 8),
        torch.zeros(4, 8, device="meta"),
        r"^weight must be on cpu like hidden_states, got meta$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    hidden_states, weight, sentence = BAD_INPUT[case]
    with pytest.raises(RuntimeError, match=sentence):
        router_logits(hidden_states, weight)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_bad_dtypes_on_cuda(dtype: torch.dtype) -> None:
    sentence = f"^hidden_states must be float32, bfloat16 or float16 on CUDA, got {str(dtype)[6:]}$"
    with pytest.raises(RuntimeError, match=sentence):
        router_logits(torch.zeros(3, 8, device="cuda").to(dtype), torch.zeros(4, 8, device="cuda"))
    with pytest.raises(RuntimeError, match=r"^weight must be on cuda:0 like hidden_states, got cpu$"):
        router_logits(torch.zeros(3, 8, device="cuda"), torch.zeros(4, 8))


@pytest.mark.parametrize("freed", ["hidden_states", "weight"])
def test_freed_storage(freed: str) -> None:
    arguments = {"hidden_states": torch.zeros(3, 8), "weight": torch.zeros(4, 8)}
    arguments[freed].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"^{freed} must have memory, got a tensor whose storage has been freed"):
        router_logits(**arguments)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 12), (1, 12), (2, 3, 12)], ids=str)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden_states = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(5, 12, requires_grad=True)
    torch.library.opcheck(torch.ops.zexpert.router_logits.default, (hidden_states, weight))


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(router_logits, fullgraph=True, backend="aot_eager", dynamic=True)
    scripted = torch.jit.script(router_logits)
    weight = torch.randn(9, 38, requires_grad=True)
    for num_tokens in (7, 3, 40):
        hidden_states = torch.randn(num_tokens, 38, requires_grad=True)
        expected = router_logits(hidden_states, weight)
        upstream = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, (hidden_states, weight), upstream)
        for function in (compiled, scripted):
            logits = function(hidden_states, weight)
            assert_equal(logits, expected)
            for one, other in zip(
                torch.autograd.grad(logits, (hidden_states, weight), upstream), gradients, strict=True
            ):
                assert_equal(one, other)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 40, 300, 2000])
def test_graph_capture(num_tokens: int, dtype: torch.dtype) -> None:
    weight = torch.randn(200, 512, device="cuda")
    hidden_states = torch.randn(num_tokens, 512, device="cuda").to(dtype)
    router_logits(hidden_states, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = router_logits(hidden_states, weight)
    for _ in range(2):
        hidden_states.copy_(torch.randn(num_tokens, 512, device="cuda"))
        graph.replay()
        assert_equal(logits, router_logits(hidden_states, weight))
