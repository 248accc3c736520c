# SPDX-License-Identifier: Apache-2.0
"""What the tests of gradients share: gradients, their comparison with those of plain PyTorch, inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from testing import assert_error_rule, weight_dtype
from zexpert import DispatchPlan, ops

#: Tokens, slots per token, real experts, hidden size and intermediate size.
T, K, R, H, F = 7, 3, 4, 19, 6

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def random_like(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(output) for output in outputs]


def gradients_of(function: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of each input when `upstream` are the gradients of the outputs; zeros where an input plays no part."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = as_tuple(function(*leaves))
    pairs = [(output, gradient) for output, gradient in zip(outputs, upstream, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    results = torch.autograd.grad([pair[0] for pair in pairs], leaves, [pair[1] for pair in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if result is None else result for leaf, result in zip(leaves, results, strict=True)]


def assert_gradients(
    function: Function,
    plain: Callable[[torch.dtype], Function],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    names: Sequence[str],
) -> None:
    """Passes if the gradients of `function` obey the error rule against plain(torch.float64), with plain(dtype), plain
    PyTorch in the dtype of the data, for the allowance."""
    with torch.no_grad():
        upstream = random_like(as_tuple(function(*inputs)))
    actual = gradients_of(function, inputs, upstream)
    same_dtype = gradients_of(plain(dtype), inputs, [gradient.to(dtype) for gradient in upstream])
    expected = gradients_of(
        plain(torch.float64), [tensor.double() for tensor in inputs], [gradient.double() for gradient in upstream]
    )
    for one, allowance, reference, name, tensor in zip(actual, same_dtype, expected, names, inputs, strict=True):
        assert one.dtype == tensor.dtype, f"the gradient of {name} has dtype {one.dtype}, not {tensor.dtype}"
        assert_error_rule(one, allowance, reference, f"gradient of {name}")


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def make_plan(num_tokens: int = T) -> tuple[DispatchPlan, int]:
    """A plan in which some slots do no work and expert 2 has none to do, and its number of rows."""
    topk_ids = torch.randint(-2, R, (num_tokens, K)).clamp(min=-1)
    plan = ops.moe_plan(topk_ids.masked_fill(topk_ids == 2, -1), R)
    return plan, int(plan.expert_offsets[-1])


def poisoned(tensor: Tensor, num_rows: int, value: float = float("nan")) -> Tensor:
    """A copy whose rows from `num_rows` on must not be read."""
    copy = tensor.detach().clone()
    copy[num_rows:] = value
    return copy


def mlp_inputs(num_rows: int, dtype: torch.dtype = torch.float64, hidden: int = H, inner: int = F) -> list[Tensor]:
    return [
        torch.randn(num_rows, hidden).to(dtype),
        (torch.randn(R, 2 * inner, hidden) / hidden**0.5).to(dtype),
        (torch.randn(R, hidden, inner) / inner**0.5).to(dtype),
    ]


def finalize_inputs(num_rows: int, dtype: torch.dtype = torch.float64, hidden: int = H) -> dict[str, Tensor]:
    weights = weight_dtype(dtype)
    return {
        "rows": torch.randn(num_rows, hidden).to(dtype),
        "topk_weights": torch.rand(T, K, dtype=weights),
        "hidden_states": torch.randn(T, hidden).to(dtype),
        "zero_weight": torch.rand(T, dtype=weights),
        "residual": torch.randn(T, hidden).to(dtype),
        "constant_weight": torch.rand(T, 2, dtype=weights),
        "constant_vectors": torch.randn(2, hidden).to(dtype),
    }
