# SPDX-License-Identifier: Apache-2.0
"""Patched models and zexpert layers under fully_shard, transformers' tensor parallelism and accelerate's offloading."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranks import Ranks
from test_integrations_transformers import TOKENS, decide_by_bias, longcat
from testing import assert_equal
from zexpert import FusedMoE
from zexpert.integrations.transformers import patch
from zexpert.models.float32_linear import Float32Linear

if not dist.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

#: The modules of a decoder layer that are units of their own.
UNITS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "experts": lambda layer: [layer.mlp.experts],
    "block": lambda layer: [layer.mlp],
    "router and experts": lambda layer: [layer.mlp.router, layer.mlp.experts],
    "layer": lambda layer: [layer],
    "experts in layer": lambda layer: [layer.mlp.experts, layer],
}


def shard(model: Any, mesh: DeviceMesh, units: str, **options: Any) -> None:
    for layer in model.model.layers:
        for module in UNITS[units](layer):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh)


def step(model: Any) -> dict[str, Tensor]:
    """The logits and all gradients, whole."""
    out = model.train()(TOKENS, labels=TOKENS)
    out.loss.backward()
    whole = {"logits": out.logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            whole[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole


def compare_fully_sharded(group: Any, units: str, patch_first: bool) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    expected = step(longcat())
    model = patch(longcat()) if patch_first else longcat()
    shard(model, mesh, units)
    if not patch_first:
        patch(model)
    actual = step(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-4 * float(value.abs().max())
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("units", UNITS)
def test_fully_shard_of_a_patched_model(units: str, ranks: Ranks) -> None:
    ranks.run(compare_fully_sharded, 2, units, True)


def test_patch_of_a_sharded_model(ranks: Ranks) -> None:
    ranks.run(compare_fully_sharded, 2, "layer", False)
    for units in ("experts", "block", "router and experts"):
        ranks.run(refuse_fully_sharded, 2, units)


def refuse_fully_sharded(group: Any, units: str) -> None:
    model = longcat()
    shard(model, DeviceMesh.from_group(group, "cpu"), units)
    with pytest.raises(ValueError, match=r"^layer 'model.layers.0.mlp' must be patched before fully_shard .*FSDPLong"):
        patch(model)
    model = longcat()
    shard(model, DeviceMesh.from_group(group, "cpu"), "layer")
    with pytest.raises(ValueError, match=r"^free_unused_weights must be False .*, but fully_shard has all rows"):
        patch(model, free_unused_weights=True)


def keep_the_routing(group: Any) -> None:
    """Mixed precision of the experts alone: the router's logits, float32, reach the runner as they are."""
    mesh = DeviceMesh.from_group(group, "cpu")
    seen: list[Tensor] = []
    model = patch(longcat())
    decide_by_bias(model)
    for layer in model.model.layers:
        layer.mlp.runner.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["router_logits"]), with_kwargs=True
        )
    shard(model, mesh, "experts", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    out = model(TOKENS)
    assert out.logits.dtype == torch.float32
    assert [logits.dtype for logits in seen] == [torch.float32] * 2
    torch.testing.assert_close(out.logits, longcat_by_bias()(TOKENS).logits, rtol=0.1, atol=0.1)


def longcat_by_bias() -> Any:
    model = longcat()
    decide_by_bias(model)
    return model


def test_mixed_precision_leaves_the_routing_alone(ranks: Ranks) -> None:
    ranks.run(keep_the_routing, 2)


class Block(nn.Module):
    """As in docs/training.md: a classifier in float32 and experts in their own precision."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = Float32Linear(16, 6)
        self.moe = FusedMoE(4, 2, 16, 8, zero_expert_type="identity", zero_expert_num=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x, self.classifier(x))
        return out


def keep_the_routing_of_a_layer(group: Any) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(3)
    block = Block()
    seen: list[Tensor] = []
    block.moe.router.set_capture_fn(lambda routing: seen.append(routing.topk_weights))
    x = torch.randn(12, 16).bfloat16()
    routing = copy.deepcopy(block).moe.router.select_experts(x, block.classifier(x))
    seen.clear()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    fully_shard(block.moe, mesh=mesh, mp_policy=policy)
    fully_shard(block, mesh=mesh)
    out = block(x)
    assert out.dtype == torch.bfloat16
    assert_equal(seen[0], routing.topk_weights)
    out.sum().backward()
    assert block.moe.w13_weight.grad is not None


def test_mixed_precision_of_a_layer(ranks: Ranks) -> None:
    """cast_forward_inputs=False is what keeps the logits: see docs/training.md."""
    ranks.run(keep_the_routing_of_a_layer, 2)


def refuse_tensor_parallel(group: Any, folder: str) -> None:
    from transformers import LongcatFlashForCausalLM
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    with torch.device("meta"):
        model = LongcatFlashForCausalLM(longcat().config)
    plan = model._expand_parallel_plan(model.tp_plan)
    apply_tensor_parallelism(model, mesh, plan)
    with pytest.raises(
        ValueError,
        match=r"^layer 'model.layers.0.mlp' must have whole experts, got .* transformers shards",
    ):
        patch(model)


def test_tensor_parallelism_of_transformers_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="needs transformers 5.23")
    ranks.run(refuse_tensor_parallel, 2, str(tmp_path))


# ---- accelerate -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("to_disk", [False, True])
def test_offloaded_weights(to_disk: bool, patch_first: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")
    model = longcat()
    expected = patch(longcat())(TOKENS).logits
    if patch_first:
        patch(model)
    for i, layer in enumerate(model.model.layers):
        if to_disk:
            accelerate.disk_offload(layer.mlp.experts, tmp_path / str(i), execution_device=torch.device("cpu"))
        else:
            accelerate.cpu_offload(layer.mlp.experts, execution_device=torch.device("cpu"))
    if not patch_first:
        with pytest.raises(ValueError, match=r"^free_unused_weights must be False .*accelerate's offloading has all"):
            patch(model, free_unused_weights=True)
        patch(model)
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta
    assert_equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("patch_first", [False, True])
def test_an_offloaded_router_is_refused(patch_first: bool) -> None:
    """transformers' own router reads the weight of its classifier without the hook that loads it."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")
    model = patch(longcat()) if patch_first else longcat()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^mlp\.router must be on a device, got .* accelerate offloads"):
        model(TOKENS) if patch_first else patch(model)


@pytest.mark.parametrize("to_disk", [False, True])
def test_an_offloaded_layer(to_disk: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")
    block = Block()
    x = torch.randn(5, 16)
    expected = block(x)
    if to_disk:
        accelerate.disk_offload(block, tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(block, execution_device=torch.device("cpu"))
    assert block.moe.w13_weight.is_meta
    assert_equal(block(x), expected)
