# SPDX-License-Identifier: Apache-2.0
"""LoRA by PEFT on models that run on zexpert: the same adapters, outputs, gradients and merged weights as without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_cases import BLOCKS, make_blocks
from test_integrations_transformers import TOKENS, longcat, other_moe
from testing import assert_equal
from zexpert import FusedMoE
from zexpert.integrations.transformers import patch, unpatch

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": EXPERTS, "target_modules": []},
    "one parameter": {"target_parameters": EXPERTS[1:], "target_modules": []},
    "experts and attention": {"target_parameters": EXPERTS, "target_modules": ["o_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear and experts": {"target_modules": "all-linear", "target_parameters": EXPERTS},
    "router": {"target_modules": ["o_proj"], "modules_to_save": ["mlp.router"]},
}


def with_lora(model: nn.Module, targets: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **targets)
    return peft.get_peft_model(model, config)


def patch_first(targets: dict[str, Any]) -> Any:
    return with_lora(patch(longcat()), targets)


def patch_last(targets: dict[str, Any]) -> Any:
    return patch(with_lora(longcat(), targets))


def step(model: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The logits, and the gradients of what LoRA trains."""
    out = model(input_ids=TOKENS, labels=TOKENS)
    out.loss.backward()
    return out.logits.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("order", [patch_first, patch_last])
@pytest.mark.parametrize("targets", TARGETS)
def test_lora_is_that_of_plain_transformers(targets: str, order: Callable[..., Any]) -> None:
    plain, ours = with_lora(longcat(), TARGETS[targets]), order(TARGETS[targets])
    expected, expected_gradients = step(plain)
    actual, gradients = step(ours)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    trained = 0
    for name, gradient in expected_gradients.items():
        if gradient is None:  # what transformers reads past: the adapter of a classifier
            assert gradients[name] is None, name
            continue
        trained += bool(gradient.any())
        tolerance = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: n + m)
    assert trained > 0
    with plain.disable_adapter(), ours.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)

    merged, expected_merged = ours.merge_and_unload(), plain.merge_and_unload()
    with torch.no_grad():
        merged_logits = expected_merged(TOKENS).logits
        torch.testing.assert_close(merged(TOKENS).logits, merged_logits, rtol=1e-4, atol=1e-4)
        if "all-linear" not in targets:  # transformers reads past a classifier's adapter until it is merged
            torch.testing.assert_close(merged_logits, expected, rtol=1e-4, atol=1e-4)
    weights = unpatch(merged).state_dict()
    for name, tensor in expected_merged.state_dict().items():
        torch.testing.assert_close(weights[name], tensor)


@pytest.mark.parametrize("order", [patch_first, patch_last])
def test_a_wrapped_model_is_unpatched(order: Callable[..., Any]) -> None:
    model, plain = order(TARGETS["experts"]), with_lora(longcat(), TARGETS["experts"])
    with torch.no_grad():
        assert_equal(unpatch(model)(TOKENS).logits, plain(TOKENS).logits)
        torch.testing.assert_close(patch(model)(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_adapters_of_freed_rows() -> None:
    freed = with_lora(patch(longcat(), free_unused_weights=True), TARGETS["experts"])
    logits, gradients = step(freed)
    assert bool(logits.isfinite().all())
    assert all(bool(gradient.any()) for gradient in gradients.values() if gradient is not None)
    assert bool(freed.merge_and_unload()(TOKENS).logits.isfinite().all())
    wrapped = with_lora(longcat(), TARGETS["experts"])
    with pytest.raises(ValueError, match=r"^free_unused_weights must be False .*, got True, but ParamWrapper"):
        patch(wrapped, free_unused_weights=True)
    patch(wrapped)


def test_saved_adapters_load_into_either(tmp_path: Path) -> None:
    trained = patch_first(TARGETS["experts"])
    trained.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(longcat(), tmp_path)
    again = peft.PeftModel.from_pretrained(patch(longcat()), tmp_path)
    with torch.no_grad():
        expected = plain(TOKENS).logits
        torch.testing.assert_close(trained(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = FusedMoE(4, 2, 16, 8, zero_expert_type="identity", zero_expert_num=2)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        out: Tensor = self.moe(hidden_states, router_logits)
        return out


def test_lora_on_a_fused_moe() -> None:
    model = Model()
    adapted = with_lora(
        copy.deepcopy(model), {"target_parameters": ["moe.w13_weight", "moe.w2_weight"], "target_modules": []}
    )
    inputs = torch.randn(9, 16), torch.randn(9, 6)
    out = adapted(*inputs)
    out.sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 4
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    assert not torch.allclose(out, model(*inputs))
    torch.testing.assert_close(adapted.merge_and_unload()(*inputs), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_lora_on_the_experts_of_a_block(name: str, tmp_path: Path) -> None:
    """Adapters are saved and loaded, the checkpoint's names and the selection bias are there as without."""

    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"mlp": make_blocks(name)[1]})

    targets = {"target_parameters": ["mlp.experts.w13_weight", "mlp.experts.w2_weight"], "target_modules": []}
    adapted = with_lora(model(), targets)
    block = adapted.base_model.model["mlp"]
    x = torch.randn(9, 16, dtype=torch.float64)
    before = make_blocks(name)[1].checkpoint_state_dict()
    (expected,) = block(x)[:1] if name == "moe++" else (block(x),)
    expected.sum().backward()
    assert all(bool(p.grad.any()) for p in adapted.parameters() if p.requires_grad)
    for key, tensor in before.items():
        assert_equal(block.checkpoint_state_dict()[key], tensor, key)
    block.load_state_dict(before, strict=False)
    if hasattr(type(block), "e_score_correction_bias"):
        assert_equal(block.e_score_correction_bias, make_blocks(name)[1].e_score_correction_bias)

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model(), tmp_path)
    for one in (block, again.base_model.model["mlp"], adapted.merge_and_unload()["mlp"]):
        out = one(x)[0] if name == "moe++" else one(x)
        torch.testing.assert_close(out, expected)


def test_lora_beside_the_experts_implementation() -> None:
    plain, ours = other_moe("qwen3_moe"), other_moe("qwen3_moe")
    plain.set_experts_implementation("eager")
    ours.set_experts_implementation("zexpert")
    results = [step(with_lora(model, TARGETS["experts"])) for model in (plain, ours)]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    for name, expected in results[0][1].items():
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(results[1][1][name], expected, rtol=1e-3, atol=tolerance)
