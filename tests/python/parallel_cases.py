# SPDX-License-Identifier: Apache-2.0
"""Layers whose experts are shared out over ranks, and what one process makes of all ranks' tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layer_cases import HIDDEN, LAYERS, SharedExperts
from testing import assert_equal, assert_error_rule
from zexpert import FusedMoE
from zexpert.runner import ExpertParallelMoERunner

INTERMEDIATE = 24
NUM_EXPERTS = 12
TOP_K = 4
NUM_TOKENS = (37, 0, 61, 25)  # of each rank: so many that plain PyTorch's largest error is no matter of luck
MAX_TOKENS = max(NUM_TOKENS)
EXCHANGES: dict[str, dict[str, Any]] = {
    "ragged": {},
    "ragged in chunks": {"chunk_size": 20},
    "fixed": {"max_tokens": MAX_TOKENS},
    "all_gather": {"max_tokens": MAX_TOKENS},
    "symmetric": {"max_tokens": MAX_TOKENS},
    "symmetric in chunks": {"max_tokens": MAX_TOKENS, "chunk_size": 11},
}


def num_columns(kind: str) -> int:
    zero_experts = LAYERS[kind].get("zero_expert_type")
    if isinstance(zero_experts, dict):
        return NUM_EXPERTS + sum(zero_experts.values())
    return NUM_EXPERTS + int(LAYERS[kind].get("zero_expert_num", 0))


def make_layer(kind: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> FusedMoE:
    """A layer whose parameters do not depend on the group that shares it."""
    torch.manual_seed(0)
    bias = 0.1 * torch.randn(num_columns(kind))
    shared_experts = SharedExperts(torch.float32).to(dtype)
    layer = FusedMoE(
        NUM_EXPERTS,
        TOP_K,
        HIDDEN,
        INTERMEDIATE,
        e_score_correction_bias=bias,
        params_dtype=dtype,
        shared_experts=shared_experts,
        **{**LAYERS[kind], **arguments},
    )
    generator = torch.Generator().manual_seed(1)
    whole = {
        "w13_weight": torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator),
        "w2_weight": torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, generator=generator),
        "constant_gate_weight": torch.randn(2, 2, HIDDEN, generator=generator),
        "constant_vectors": torch.randn(2, HIDDEN, generator=generator),
    }
    for name, weight in whole.items():
        whole[name] = (0.2 * weight).to(torch.bfloat16).to(dtype)  # the same in every dtype
    if layer.constant_vectors is None:
        del whole["constant_gate_weight"], whole["constant_vectors"]
    layer.load_state_dict({**layer.state_dict(), **whole})
    return layer


def make_parallel(kind: str, exchange: str, group: Any, dtype: torch.dtype = torch.float32, **extra: Any) -> FusedMoE:
    arguments = dict(EXCHANGES[exchange])
    layer = make_layer(kind, dtype, expert_parallel_group=group, chunk_size=arguments.pop("chunk_size", None), **extra)
    if arguments:
        runner_of(layer).use_exchange(exchange.removesuffix(" in chunks"), **arguments)
    return layer


def runner_of(layer: FusedMoE) -> ExpertParallelMoERunner:
    assert isinstance(layer.runner, ExpertParallelMoERunner)
    return layer.runner


def make_inputs(kind: str, num_tokens: int, case: str = "random") -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, router_logits and the gradient of the output, in float64 with values that bfloat16 holds."""
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16().double()
    gradient = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16().double()
    logits = torch.randn(num_tokens, num_columns(kind), generator=generator).double()
    if case == "one expert":
        logits[:, :NUM_EXPERTS] = -torch.inf
        logits[:, 5] = 1.0
    elif case == "only zero experts":
        logits[:, :NUM_EXPERTS] = -torch.inf
    return hidden_states, logits, gradient


def results(layer: FusedMoE, hidden_states: Tensor, logits: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The layer's output and all gradients."""
    device, dtype = layer.w13_weight.device, layer.w13_weight.dtype
    layer.zero_grad()
    x = hidden_states.to(device, dtype, copy=True).requires_grad_()
    router_logits = logits.to(device, torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    out = layer(x, router_logits)
    out.backward(gradient.to(device, dtype))
    wanted = {"hidden_states": x, "router_logits": router_logits, **dict(layer.named_parameters())}
    # None: it had no work.
    gradients = {
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in wanted.items()
    }
    return {name: tensor.cpu() for name, tensor in {"out": out.detach(), **gradients}.items()}


def share_of(rank: int) -> slice:
    return slice(sum(NUM_TOKENS[:rank]), sum(NUM_TOKENS[: rank + 1]))


def sum_over_shares(kind: str, dtype: torch.dtype, num_ranks: int, inputs: tuple[Tensor, ...], name: str) -> Tensor:
    """A gradient in plain PyTorch, summed over the ranks' shares of the tokens."""
    layer = make_layer(kind, dtype, experts_backend="torch")
    parts = [results(layer, *(tensor[share_of(rank)] for tensor in inputs))[name] for rank in range(num_ranks)]
    return torch.stack(parts).sum(dim=0)


def assert_as_one_process(
    group: Any, kind: str, exchange: str, dtype: torch.dtype, case: str = "random", device: str = "cpu", **extra: Any
) -> None:
    """Every rank's output and gradients against one process, by the error rule: plain PyTorch in the same dtype is the
    layer on the experts backend "torch"."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    inputs = make_inputs(kind, sum(NUM_TOKENS[:num_ranks]), case)
    share = share_of(rank)
    layer = make_parallel(kind, exchange, group, dtype, **extra).to(device)
    actual = results(layer, *(tensor[share] for tensor in inputs))
    plain = results(make_layer(kind, dtype, experts_backend="torch"), *inputs)
    expected = results(make_layer(kind, torch.float64, experts_backend="torch"), *inputs)
    num_local = NUM_EXPERTS // num_ranks
    for name, value in actual.items():
        if name in ("out", "hidden_states", "router_logits"):
            part = share
        elif name in ("w13_weight", "w2_weight"):
            part = slice(rank * num_local, (rank + 1) * num_local)
        else:  # held by every rank: their sum is one process's
            on_device = value.to(device)
            dist.all_reduce(on_device, group=group)
            value, part = on_device.cpu(), slice(None)
            plain[name] = sum_over_shares(kind, dtype, num_ranks, inputs, name)
        whole = expected[name].to(value.dtype, copy=True)
        assert value.shape == whole[part].shape
        whole[part] = value
        assert_error_rule(whole, plain[name], expected[name], f"{kind}, {exchange}, {case}: {name}")


def assert_slices_as_one_process(group: Any, num_tokens: int, device: str = "cpu") -> None:
    """A slice of every expert on each rank, against one process by the error rule."""
    rank = dist.get_rank(group)
    for kind, dtype in (*((kind, torch.float32) for kind in LAYERS), ("mixed", torch.bfloat16)):
        inputs = make_inputs(kind, num_tokens)
        layer = make_layer(kind, dtype, tensor_parallel_group=group, recompute=kind == "constant").to(device)
        size = INTERMEDIATE // dist.get_world_size(group)
        assert layer.w13_weight.shape == (NUM_EXPERTS, 2 * size, HIDDEN)
        actual = results(layer, *inputs)
        plain = results(make_layer(kind, dtype, experts_backend="torch"), *inputs)
        expected = results(make_layer(kind, torch.float64, experts_backend="torch"), *inputs)
        own = slice(rank * size, (rank + 1) * size)
        for each in (plain, expected):
            each["w2_weight"] = each["w2_weight"][:, :, own]
            each["w13_weight"] = each["w13_weight"].unflatten(1, (2, -1))[:, :, own].flatten(1, 2)
        for name, value in actual.items():
            assert_error_rule(value, plain[name], expected[name], f"{kind}, {dtype}: {name}")
            if name not in ("w13_weight", "w2_weight"):
                first = value.to(device, copy=True)
                dist.broadcast(first, 0, group=group)
                assert_equal(value, first.cpu(), f"{kind}, {dtype}: {name} on another rank")
