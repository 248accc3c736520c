# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in shards, wherever they are cut, and checkpoints that are quantised."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from model_cases import BLOCKS, as_module_list, make_blocks
from ranks import Ranks
from testing import assert_equal
from zexpert import FusedMoE
from zexpert.models import checkpoint_state_dict


def checkpoint(name: str) -> dict[str, Tensor]:
    """One block's weights under its model's names, the experts as a module list."""
    weights = make_blocks(name)[1].checkpoint_state_dict()
    return as_module_list(weights) if "experts.gate_up_proj" in weights else weights


def fresh(name: str, **options: Any) -> nn.Module:
    block, config = BLOCKS[name]
    torch.manual_seed(5)
    made: nn.Module = block(config, params_dtype=torch.float64, **options)
    return made


def shards_of(weights: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Cuts through the middle of experts, and of their projections."""
    names = sorted(weights, key=lambda name: (hash_of(name), name))
    return [{name: weights[name] for name in names[first::count]} for first in range(count)]


def hash_of(name: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(name)) % 17


def assert_same_weights(block: nn.Module, name: str) -> None:
    expected = make_blocks(name)[1].state_dict()
    for key, tensor in block.state_dict().items():
        assert_equal(tensor, expected[key], key)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name", BLOCKS)
def test_shards_fill_a_block(name: str, count: int, assign: bool) -> None:
    block = fresh(name, device="meta" if assign else None)
    if assign:
        block.to_empty(device="meta")
    missing: set[str] | None = None
    for shard in shards_of(checkpoint(name), count):
        keys = block.load_state_dict(shard, strict=False, assign=assign)
        assert not keys.unexpected_keys
        missing = set(keys.missing_keys) if missing is None else missing & set(keys.missing_keys)
    assert not missing
    assert_same_weights(block, name)
    assert_same_weights(copy.deepcopy(block), name)


@pytest.mark.parametrize("name", BLOCKS)
def test_an_incomplete_layer_is_told(name: str) -> None:
    weights = checkpoint(name)
    lost = next(key for key in weights if ".3.up_proj" in key)
    del weights[lost]
    block = fresh(name)
    missing: set[str] | None = None
    for shard in [{}, *shards_of(weights, 3), {}]:
        keys = set(block.load_state_dict(shard, strict=False).missing_keys)
        missing = keys if missing is None else missing & keys
    assert missing == {"experts.w13_weight" if name == "moe++" else "experts.gate_up_proj"}
    # Another checkpoint starts anew: the first one's tensors do not count.
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: .*"{lost}"'):
        block.load_state_dict(weights)
    with pytest.raises(RuntimeError, match=f"^{lost} must be in the checkpoint, got none$"):
        BLOCKS[name][0].from_state_dict(BLOCKS[name][1], weights)
    block.load_state_dict(checkpoint(name))
    assert_same_weights(block, name)


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("name", BLOCKS)
def test_shards_by_distributed_checkpoint(name: str, device: str | None) -> None:
    """set_model_state_dict, and so accelerate's loader, gives load_state_dict the model's own entries too."""
    model = nn.ModuleDict({"mlp": fresh(name, device=device), "norm": nn.LayerNorm(2)})
    for shard in shards_of({f"mlp.{key}": tensor for key, tensor in checkpoint(name).items()}, 3):
        set_model_state_dict(model, shard, options=StateDictOptions(full_state_dict=True, strict=False))
    assert_same_weights(model["mlp"], name)


def test_what_no_shard_has_stays_as_it_was() -> None:
    block, before = fresh("longcat"), fresh("longcat").state_dict()
    weights = checkpoint("longcat")
    block.load_state_dict({key: value for key, value in weights.items() if "experts.2." in key}, strict=False)
    for expert in range(6):
        expected = make_blocks("longcat")[1].state_dict() if expert == 2 else before
        for weight in ("experts.w13_weight", "experts.w2_weight"):
            assert_equal(block.state_dict()[weight][expert], expected[weight][expert])
    assigned = fresh("longcat", device="meta")
    assigned.load_state_dict({"experts.2.down_proj.weight": weights["experts.2.down_proj.weight"]}, False, assign=True)
    assert [bool(weight.isnan().all()) for weight in assigned.experts.w2_weight] == [i != 2 for i in range(6)]


def test_a_weight_without_memory_is_warned_of() -> None:
    block = fresh("qwen3", device="meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block.load_state_dict(checkpoint("qwen3"))
    assert any("experts.w13_weight" in str(one.message) and "assign=True" in str(one.message) for one in caught)
    assert block.experts.w13_weight.is_meta


def test_filling_allocates_no_second_layer() -> None:
    """The weights are the ones that were there, and the checkpoint's tensors are read in place."""
    block, weights = fresh("longcat"), checkpoint("longcat")
    places = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    largest = max(tensor.nbytes for tensor in weights.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        block.load_state_dict(weights)
    assert {name: parameter.data_ptr() for name, parameter in block.named_parameters()} == places
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= largest


def in_shards(group: Any, name: str, kind: str) -> None:
    for assign in (False, True):
        block = fresh(name, **{kind: group}, device="meta" if assign else None)
        for shard in shards_of(checkpoint(name), 3):
            block.load_state_dict(shard, strict=False, assign=assign)
        gathered, expected = block.checkpoint_state_dict(), make_blocks(name)[1].checkpoint_state_dict()
        for key, tensor in expected.items():
            assert_equal(gathered[key], tensor, key)


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("kind", ["expert_parallel_group", "tensor_parallel_group"])
@pytest.mark.parametrize("name", BLOCKS)
def test_ranks_take_their_parts_of_shards(name: str, kind: str, ranks: Ranks) -> None:
    ranks.run(in_shards, 2, name, kind)


def test_blocks_pickle_in_the_middle() -> None:
    block = fresh("longcat")
    first, second = shards_of(checkpoint("longcat"), 2)
    block.load_state_dict(first, strict=False)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    again.load_state_dict(second, strict=False)
    assert_same_weights(again, "longcat")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_whole_models_checkpoint(name: str) -> None:
    model = nn.ModuleDict({"layers": make_blocks(name), "norm": nn.LayerNorm(4)})
    weights = checkpoint_state_dict(model)
    own = {f"layers.{i}.{key}" for i in range(2) for key in make_blocks(name)[i].checkpoint_state_dict()}
    assert weights.keys() == own | {"norm.weight", "norm.bias"}
    again = nn.ModuleDict({"layers": nn.ModuleList([fresh(name), fresh(name)]), "norm": nn.LayerNorm(4)})
    again.load_state_dict(weights)
    for key, tensor in model.state_dict().items():
        assert_equal(again.state_dict()[key], tensor, key)
    assert checkpoint_state_dict(model["layers"][0]).keys() == model["layers"][0].checkpoint_state_dict().keys()


# ---- Quantised ------------------------------------------------------------------------------------------------------

QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_quantised_experts_are_refused(name: str, dtype: torch.dtype, strict: bool) -> None:
    layouts = [checkpoint(name), make_blocks(name)[1].checkpoint_state_dict(), make_blocks(name)[1].state_dict()]
    for weights in layouts:
        quantised = {
            key: tensor.float().to(dtype) if "experts" in key and tensor.dim() > 1 else tensor
            for key, tensor in weights.items()
        }
        quantised |= {f"{key}_scale_inv": torch.ones(1) for key in quantised if "experts" in key}
        block, before = fresh(name), fresh(name).state_dict()
        with pytest.raises(
            RuntimeError, match=rf"^\S*experts\.\S+ must be of a floating-point dtype that needs no scale, got {dtype}$"
        ):
            block.load_state_dict(quantised, strict=strict)
        for key, tensor in block.state_dict().items():
            assert_equal(tensor, before[key], key)
        # Of float8_e4m3fn with scales it makes a quantised block.
        message = "_scale_inv must have shape" if dtype == torch.float8_e4m3fn else "needs no scale"
        with pytest.raises(RuntimeError, match=message):
            BLOCKS[name][0].from_state_dict(BLOCKS[name][1], quantised, assign=True)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_a_quantised_layer_is_refused(dtype: torch.dtype, assign: bool) -> None:
    model = nn.ModuleDict({"moe": FusedMoE(4, 2, 8, 8, shared_experts=nn.Linear(8, 8))})
    for name in ("moe.w2_weight", "moe.runner.shared_experts.weight"):
        weights = dict(model.state_dict())
        weights[name] = weights[name].to(dtype)
        with pytest.raises(RuntimeError, match=f"^{name} must be of a floating-point dtype that needs no scale, got"):
            model.load_state_dict(weights, strict=False, assign=assign)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(half)  # of lower precision, but values
