# SPDX-License-Identifier: Apache-2.0
"""torch.export takes the layer for every number of tokens; AOTInductor compiles what it gives. C++ runs the result in
tests/cpp/embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layer_cases import LAYERS, SharedExperts, make_inputs, make_layer
from testing import assert_equal
from zexpert.models import LongcatFlashConfig, LongcatFlashMoE
from zexpert.router import ZeroExpertRouter

Compiled = Callable[[torch.export.ExportedProgram], Any]  # the fixture compiled_ahead_of_time

TOKENS = torch.export.Dim("tokens", min=0, max=4096)


def export(module: nn.Module, *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    """The module's inference program; its inputs' first dimension is the tokens."""
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=tuple({0: TOKENS} for _ in inputs))


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_exported_layers(kind: str) -> None:
    layer = make_layer(kind, shared_experts=SharedExperts())
    program = export(layer, *make_inputs(kind, 7)).module()
    for num_tokens in (0, 1, 7, 33):
        inputs = make_inputs(kind, num_tokens)
        assert_equal(program(*inputs), layer(*inputs))


@torch.no_grad()
def test_exported_under_autocast() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    inputs = make_inputs("mixed", 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(torch.export.export(layer, inputs).module()(*inputs), layer(*inputs))


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    layer = make_layer("mixed")
    torch.export.save(export(layer, *make_inputs("mixed", 7)), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2").module()
    inputs = make_inputs("mixed", 12)
    assert_equal(program(*inputs), layer(*inputs))


@torch.no_grad()
def test_aotinductor_runs_the_same_kernels(compiled_ahead_of_time: Compiled) -> None:
    """Nothing in this layer is Inductor's to rewrite."""
    layer = make_layer("identity")
    program = compiled_ahead_of_time(export(layer, *make_inputs("identity", 7)))
    for num_tokens in (0, 1, 7, 33, 1000):
        inputs = make_inputs("identity", num_tokens)
        assert_equal(program(*inputs), layer(*inputs))


@torch.no_grad()
def test_aotinductor_beside_torch_operators(compiled_ahead_of_time: Compiled) -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    program = compiled_ahead_of_time(export(layer, *make_inputs("mixed", 7)))
    for num_tokens in (0, 1, 7, 33, 1000):
        inputs = make_inputs("mixed", num_tokens)
        torch.testing.assert_close(program(*inputs), layer(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
def test_aotinductor_router(indices_dtype: torch.dtype, compiled_ahead_of_time: Compiled) -> None:
    router = ZeroExpertRouter(2, 5, "identity", indices_dtype=indices_dtype)
    inputs = torch.randn(33, 3), torch.randn(33, 8)
    for actual, expected in zip(compiled_ahead_of_time(export(router, *inputs))(*inputs), router(*inputs), strict=True):
        assert_equal(actual, expected)


@torch.no_grad()
def test_aotinductor_longcat_block(compiled_ahead_of_time: Compiled) -> None:
    config = LongcatFlashConfig(
        hidden_size=24, expert_ffn_hidden_size=20, n_routed_experts=6, zero_expert_num=3, moe_topk=3
    )
    block = LongcatFlashMoE(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    program = compiled_ahead_of_time(export(block, torch.randn(7, 24)))
    for num_tokens in (1, 5, 300):
        hidden_states = torch.randn(num_tokens, 24)
        torch.testing.assert_close(program(hidden_states), block(hidden_states))
