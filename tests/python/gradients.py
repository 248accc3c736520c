"""What the tests of gradients share: gradients of a function and their comparison with those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from testing import assert_error_rule

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
