# SPDX-License-Identifier: Apache-2.0
"""Helpers that the tests share: the error rule, bitwise equality, inputs of every layout, code in Markdown."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import reference

#: A block of code in Markdown: its language and its content.
FENCED_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fenced_blocks(text: str, language: str) -> list[str]:
    """The contents of the blocks of `language` in a text of Markdown."""
    return [content for block_language, content in FENCED_BLOCK.findall(text) if block_language == language]


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of routing weights with data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def coordinate(index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape))


def assert_error_rule(actual: Tensor, plain_same_dtype: Tensor, reference: Tensor, name: str = "result") -> None:
    """Passes if no element of `actual` is further from the float64 `reference` than twice the largest error of plain
    PyTorch at the same dtype, plus one rounding unit of the output dtype at the element's own magnitude (so that a
    plain result that happens to be exact does not make the rule impossible). No tolerance is tuned by hand.
    """
    assert actual.shape == reference.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    if actual.numel() == 0:
        return
    expected = reference.double()
    plain = plain_same_dtype.to(actual.dtype).double()
    finite = expected.isfinite()
    assert_equal(
        actual.double().masked_fill(finite, 0.0), expected.masked_fill(finite, 0.0), f"{name}, non-finite part"
    )

    error = (actual.double() - expected).abs().masked_fill(~finite, 0.0)
    plain_error = float((plain - expected).abs().masked_fill(~finite, 0.0).max())
    finfo = torch.finfo(actual.dtype)
    magnitude = expected.abs().masked_fill(~finite, 0.0)
    if actual.dtype == torch.float64:
        plain_error = 1e-13 * float(magnitude.max())
    allowed = 2.0 * plain_error + finfo.eps * magnitude + finfo.smallest_normal
    excess = (error - allowed).nan_to_num(torch.inf)
    worst = int(excess.argmax())
    at = coordinate(worst, actual.shape)
    if float(excess.flatten()[worst]) > 0.0:
        raise AssertionError(
            f"{name}{list(at)} is {float(actual[at])!r}, the reference {float(expected[at])!r}: error"
            f" {float(error[at]):.3e}, plain PyTorch's largest is {plain_error:.3e};"
            f" {int((excess > 0).sum())} of {excess.numel()} elements break the rule"
        )


def assert_equal(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Passes if both tensors hold the same values bit for bit in the same dtype; a NaN equals a NaN."""
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name} has dtype {actual.dtype}, not {expected.dtype}"
    differs = actual != expected
    if actual.is_floating_point():
        differs &= ~(actual.isnan() & expected.isnan())
    if bool(differs.any()):
        at = coordinate(int(differs.flatten().int().argmax()), actual.shape)
        raise AssertionError(
            f"{name}{list(at)} is {actual[at].item()!r}, expected {expected[at].item()!r};"
            f" {int(differs.sum())} of {differs.numel()} elements differ"
        )


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values of a [rows, columns] tensor in every layout an op may be given."""
    rows, columns = tensor.shape
    wide = tensor.new_zeros(rows, columns + 3)
    wide[:, 1 : columns + 1] = tensor
    spread = tensor.new_zeros(rows, 2 * columns)
    spread[:, ::2] = tensor
    return {
        "contiguous": tensor.contiguous(),
        "row stride": wide[:, 1 : columns + 1],
        "transposed": tensor.t().contiguous().t(),
        "inner stride": spread[:, ::2],
    }


@contextlib.contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    """Checks that what runs inside leaves the tensors as they are, however it ends."""
    given = [tensor for tensor in tensors if tensor is not None]
    before = [tensor.clone() for tensor in given]
    try:
        yield
    finally:
        for tensor, copy in zip(given, before, strict=True):
            assert_equal(tensor, copy, "an input that must not change")


#: What filled_memory() puts into new int32 tensors.
UNWRITTEN_INTEGER = torch.iinfo(torch.int32).max


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """New tensors without values hold NaN, or the largest integer, on every device."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(1).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def failing(operator: str, key: str) -> Iterator[None]:
    """PyTorch's operator fails inside this, as it does when there is no memory."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    library = torch.library.Library("aten", "IMPL")
    library.impl(operator, fail, key)
    try:
        yield
    finally:
        library._destroy()


def on_device(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`op` for tensors on the CPU, run on `device`: arguments go there with their layout, alignment and shared memory,
    and what the op did to them comes back, as do the results, and gradients to those that want one. Skips the test
    where the op does not support a dtype or size there."""

    def run(*args: Any, **kwargs: Any) -> Any:
        memories: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        moved: list[tuple[Tensor, Tensor]] = []

        def there(value: Any) -> Any:
            if isinstance(value, list):
                return [there(each) for each in value]
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                return value
            if value.requires_grad and torch.is_grad_enabled():
                return value.to(device)
            storage = value.untyped_storage()
            key = (storage.data_ptr(), value.dtype)
            if key not in memories:
                size = storage.nbytes() // value.element_size()
                memory = value.detach().as_strided((size,), (1,), 0)
                memories[key] = (memory, memory.to(device))
            tensor = memories[key][1].as_strided(value.shape, value.stride(), value.storage_offset())
            moved.append((value, tensor))
            return tensor

        def back(value: Any) -> Any:
            if isinstance(value, tuple):
                parts = map(back, value)
                return tuple(parts) if type(value) is tuple else type(value)(*parts)
            if value is None:
                return None
            given = [original for original, tensor in moved if tensor is value]
            return given[0] if given else value.cpu()

        try:
            result = op(*(there(value) for value in args), **{name: there(value) for name, value in kwargs.items()})
        except RuntimeError as error:
            if re.search(r" on CUDA, got \w+$", str(error).splitlines()[0]):
                pytest.skip(str(error).splitlines()[0])
            raise
        for memory, copy in memories.values():
            if not torch.equal(memory.view(torch.uint8), copy.cpu().view(torch.uint8)):
                memory.copy_(copy)
        return back(result)

    return run


def random_logits(num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (1.5 * torch.randn(num_tokens, num_experts, dtype=torch.float64)).to(dtype)


def assert_ids(
    topk_ids: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    share_decided: float = 0.99,
    indices_dtype: torch.dtype = torch.int32,
    **routing: object,
) -> tuple[Tensor, reference.RoutingResult]:
    """Passes if `topk_ids` are the reference's on every row that rounding cannot decide otherwise, and at least
    `share_decided` of the rows are such. Returns which rows are, [T] bool, and the reference's routing."""
    decided = reference.decided_rows(logits, bias, top_k, **routing)  # type: ignore[arg-type]
    assert len(decided) == 0 or float(decided.float().mean()) >= share_decided, "the inputs leave rows to rounding"
    expected = reference.biased_topk(logits, bias, top_k, indices_dtype=indices_dtype, **routing)  # type: ignore[arg-type]
    assert topk_ids.shape == expected.topk_ids.shape
    assert_equal(topk_ids[decided], expected.topk_ids[decided], "topk_ids")
    return decided, expected


def assert_routing(
    result: Sequence[Tensor],
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    share_decided: float = 0.99,
    indices_dtype: torch.dtype = torch.int32,
    **routing: object,
) -> None:
    """Passes if `result`, what biased_topk returned, has the reference's ids exactly and its weights by the error rule
    on every row that rounding cannot decide otherwise, and at least `share_decided` of the rows are such."""
    topk_weights, topk_ids = result[:2]
    decided, expected = assert_ids(
        topk_ids, logits, bias, top_k, share_decided=share_decided, indices_dtype=indices_dtype, **routing
    )
    assert bool((topk_weights[topk_ids < 0] == 0).all()), "a slot without work must have weight 0"
    dtype = weight_dtype(logits.dtype)
    plain = expected
    if dtype != torch.float64:
        plain = reference.biased_topk(logits, bias, top_k, dtype=dtype, **routing)  # type: ignore[arg-type]
    for index, name in ((0, "topk_weights"), (2, "zero_weight"), (3, "constant_weight")):
        assert result[index].dtype == dtype, f"{name} has dtype {result[index].dtype}, not {dtype}"
        assert_error_rule(result[index][decided], plain[index][decided], expected[index][decided], name)
