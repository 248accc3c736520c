# SPDX-License-Identifier: Apache-2.0
"""Choices of experts of a whole model, recorded in one run and repeated in another.

Reinforcement learning needs this: the trainer computes the probabilities of tokens that a server generated, and must
use the experts that the server used. Rounding alone makes another choice where two experts are close.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zexpert._choice_taps import BufferRecorder, ChoiceTap, Player, Recorder
from zexpert.router.biased_topk_router import BiasedTopKRouter
from zexpert.telemetry import moe_runners

#: Experts of a record are int16.
_MOST_EXPERTS = torch.iinfo(torch.int16).max + 1


@contextmanager
def record_choices(model: nn.Module, max_tokens: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Records the experts that every token chooses in every mixture-of-experts layer of `model`.

        with zexpert.record_choices(model) as record:
            model(tokens)

    The record is complete when the block ends, also by an exception. A layer's rows are the tokens that its router saw,
    of all calls in their order: with chunks all tokens, with expert parallelism this rank's. The forward that
    activation checkpointing repeats in the backward is not recorded again. Blocks nest; a block inside replay_choices
    records what is replayed.

    With `max_tokens` the choices are written into a buffer on the device: a CUDA graph captured inside the block
    records at each replay, and torch.compile needs no graph break. Without, a CUDA graph is refused, and torch.compile
    breaks its graph at each router.

    Args:
        model: a FusedMoE layer, a runner, or any module that contains some. Its routers choose by biased_topk.
        max_tokens: most tokens that a layer routes inside the block; None for any number.

    Yields:
        A dict, filled when the block ends: by layer name, as in zexpert.telemetry, [T, K] int16 on the layer's device:
        experts of all N, zero experts by their own number, -1 for an empty slot.

    Raises:
        ValueError: if model is a script, has no such layer, or has one with another router or more than 32768 experts;
            when the block ends, if a layer routed more than max_tokens tokens.
        RuntimeError: from a layer, if it is captured, traced or exported without max_tokens, or scripted.
    """
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1):
        raise ValueError(f"max_tokens must be an integer of at least 1 or None, got {max_tokens!r}")
    routers = _choosing_routers(model)
    recorders: dict[str, Recorder | BufferRecorder] = {}
    for name, router in routers.items():
        if max_tokens is None:
            recorders[name] = Recorder(router)
        else:
            recorders[name] = BufferRecorder(router, max_tokens, _device_of(model.get_submodule(name)))
    record: dict[str, Tensor] = {}
    try:
        for name, router in routers.items():
            router._choice_taps = (*router._choice_taps, recorders[name])
        yield record
    finally:
        _remove_taps(routers, recorders)
        record.update({name: recorder.rows() for name, recorder in recorders.items()})
    for name, recorder in recorders.items():
        recorder.check(name)


@contextmanager
def replay_choices(model: nn.Module, record: Mapping[str, Tensor]) -> Iterator[None]:
    """Makes every mixture-of-experts layer of `model` use the experts of a record instead of choosing.

        with zexpert.replay_choices(model, record):
            loss_of(model(tokens)).backward()

    Weights still follow from the router's logits, and gradients flow to them. A layer's calls use the rows of its
    record one after the other; when the block ends all rows must be used. If activation checkpointing repeats forwards,
    call backward inside the block and before the layer's next forward: a repeated forward uses the rows of the layer's
    last call. The innermost of nested blocks decides. A CUDA graph is refused; torch.compile breaks its graph at each
    router.

    Args:
        model: a FusedMoE layer, a runner, or any module that contains some. Its routers choose by biased_topk.
        record: as record_choices gives it: by layer name, [T, K] of any integer dtype. On another device than the
            layer, rows are copied there at each call. On a GPU a number that is not an expert's, and an expert that
            repeats within a row, leaves its slot empty; on the CPU they are errors.

    Raises:
        ValueError: if model is a script, has no such layer or one with another router; if the record lacks a layer, has
            one that the model lacks, or one of another K; from a layer, if its record has too few rows; when the block
            ends, if rows are left.
        RuntimeError: from a layer, if it is captured, traced or exported, or scripted.
    """
    routers = _choosing_routers(model)
    _check_record(record, routers)
    players = {name: Player(name, record[name]) for name in routers}
    try:
        for name, router in routers.items():
            router._choice_taps = (players[name], *router._choice_taps)
        yield
    finally:
        _remove_taps(routers, players)
    for player in players.values():
        player.check()


def record_of_routed_experts(
    routed_experts: Sequence[Any],
    model: nn.Module,
    *,
    layers: Mapping[str, int] | None = None,
    padded_length: int | None = None,
) -> dict[str, Tensor]:
    """A record from the arrays of routed experts that serving engines return, one per sequence.

    Args:
        routed_experts: arrays or tensors [T, L, K] of integers, in the order in which the model will see the sequences.
            The largest number of an unsigned dtype is an empty slot, unless it is an expert.
        model: the model that will replay the record.
        layers: by layer name, the layer's index in the L layers; None: the first number in the layer's name.
        padded_length: tokens of each sequence in the model's batch; missing tokens at the end get empty slots. None:
            the sequences follow each other without padding.

    Returns:
        By layer name, [tokens of all sequences, K] int16 on the CPU.

    Raises:
        ValueError: if an array has another shape, a number that is not an expert's, or an expert twice for a token, as
            engines write zero experts when they record them as expert 0; or if a layer has no index, or one out of
            range.
    """
    routers = _choosing_routers(model)
    sequences = [torch.as_tensor(array).cpu() for array in routed_experts]
    if not sequences:
        raise ValueError("routed_experts must have at least one array, got none")
    record = {}
    for name, router in routers.items():
        layer = _layer_index(name, layers)
        parts = []
        for index, sequence in enumerate(sequences):
            choices = _layer_choices(f"routed_experts[{index}]", sequence, layer, name, router)
            missing = 0 if padded_length is None else padded_length - choices.size(0)
            if missing < 0:
                raise ValueError(
                    f"padded_length must be at least {choices.size(0)}, the tokens of routed_experts[{index}], "
                    f"got {padded_length}"
                )
            parts.append(nn.functional.pad(choices, (0, 0, 0, missing), value=-1))
        record[name] = torch.cat(parts)
    return record


def _remove_taps(routers: Mapping[str, BiasedTopKRouter], taps: Mapping[str, ChoiceTap]) -> None:
    for name, router in routers.items():
        router._choice_taps = tuple(tap for tap in router._choice_taps if tap is not taps[name])


def _choosing_routers(model: nn.Module) -> dict[str, BiasedTopKRouter]:
    """The routers in `model` by layer name.

    Raises:
        ValueError: if there are none, or one is of a script or makes its choices in another way than by biased_topk.
    """
    runners = moe_runners(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and module.original_name.endswith("MoERunner"):
            raise ValueError(f"model must not be scripted, got a script for {name!r}: a script has no Python to call")
    if not runners:
        raise ValueError(f"model must have a layer of zexpert, got {type(model).__name__} without one")
    routers: dict[str, BiasedTopKRouter] = {}
    for name, runner in runners.items():
        router = runner.router
        if not isinstance(router, BiasedTopKRouter) or not router._is_biased_topk:
            raise ValueError(f"layer {name!r} must choose by biased_topk, got a {type(router).__name__} that does not")
        if router.num_logits is not None and router.num_logits > _MOST_EXPERTS:
            raise ValueError(f"layer {name!r} must have at most {_MOST_EXPERTS} experts, got {router.num_logits}")
        routers[name] = router
    return routers


def _device_of(layer: nn.Module) -> torch.device:
    """The device of the layer's weights."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        return tensor.device
    return torch.device("cpu")


def _check_record(record: Mapping[str, Tensor], routers: Mapping[str, BiasedTopKRouter]) -> None:
    """Raises ValueError unless `record` is one of the model with these routers."""
    if not isinstance(record, Mapping):
        raise ValueError(f"record must be a mapping from layer names to tensors, got {type(record).__name__}")
    for name, router in routers.items():
        if name not in record:
            raise ValueError(f"record must have every layer of the model, got none for {name!r}")
        rows = record[name]
        if not isinstance(rows, Tensor) or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            given = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"record must have integer tensors, got {given} for layer {name!r}")
        if rows.dim() != 2 or rows.size(1) != router.top_k:
            raise ValueError(
                f"record must have shape [tokens, {router.top_k}] for layer {name!r}, got {list(rows.shape)}"
            )
    unknown = [name for name in record if name not in routers]
    if unknown:
        raise ValueError(f"record must have layers of the model alone, got {unknown[0]!r}")


def _layer_choices(argument: str, sequence: Tensor, layer: int, name: str, router: BiasedTopKRouter) -> Tensor:
    """[T, K] int16, the choices of one layer in an engine's array [T, L, K], checked."""
    if sequence.dim() != 3 or sequence.is_floating_point() or sequence.is_complex() or sequence.dtype == torch.bool:
        raise ValueError(
            f"{argument} must be integers of shape [tokens, layers, top_k], got {sequence.dtype} "
            f"of shape {list(sequence.shape)}"
        )
    if not 0 <= layer < sequence.size(1):
        raise ValueError(f"{argument} must have layer {layer}, for {name!r}, got {sequence.size(1)} layers")
    if sequence.size(2) != router.top_k:
        raise ValueError(f"{argument} must have {router.top_k} experts per token for {name!r}, got {sequence.size(2)}")
    choices = sequence[:, layer].to(torch.int32)
    num_experts = _MOST_EXPERTS if router.num_logits is None else router.num_logits
    if not sequence.dtype.is_signed and torch.iinfo(sequence.dtype).max >= num_experts:
        choices = choices.masked_fill(choices == torch.iinfo(sequence.dtype).max, -1)
    is_wrong = (choices < -1) | (choices >= num_experts)
    if bool(is_wrong.any()):
        raise ValueError(
            f"{argument} must have experts below {num_experts} for {name!r}, got {int(choices[is_wrong][0])}"
        )
    ordered = choices.sort(dim=1).values
    is_repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(is_repeated.any()):
        raise ValueError(
            f"{argument} must have an expert once per token for {name!r}, got {int(ordered[:, 1:][is_repeated][0])} "
            "twice: without zexpert an engine records zero experts as expert 0"
        )
    return choices.to(torch.int16)


def _layer_index(name: str, layers: Mapping[str, int] | None) -> int:
    """The index of a layer among those of an engine."""
    if layers is not None:
        if name not in layers:
            raise ValueError(f"layers must have every layer of the model, got none for {name!r}")
        return layers[name]
    number = re.search(r"(?<![^.])\d+(?![^.])", name)
    if number is None:
        raise ValueError(f"layers must be given for layer {name!r}, because its name has no number, got None")
    return int(number.group())
