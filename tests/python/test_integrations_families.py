# SPDX-License-Identifier: Apache-2.0
"""The experts implementation "zexpert" in every family of the installed transformers that takes one: it gives eager's
result, or refuses in one sentence."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from testing import assert_error_rule

transformers = pytest.importorskip("transformers")

import zexpert.integrations.transformers  # noqa: E402, F401

MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation\b.*?^class (\w+)", re.MULTILINE | re.DOTALL)
EXPERTS = [
    (path.parent.name, path.stem, name)
    for path in sorted(MODELS.glob("*/modeling_*.py"))
    for name in DECORATED.findall(path.read_text())
]
NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 2, 16, 8

#: Sizes, by patterns of their names in the families' configurations.
SIZES = {
    r"(num_|n_routed_|num_local_|moe_num_)experts": NUM_EXPERTS,
    r"hidden_size|hidden_dim|d_model": HIDDEN,
    r"(\w*_)?intermediate_size|\w*ffn_hidden_size|ffn_dim|expert_dim": INTERMEDIATE,
}


class SmallConfig:
    """A family's configuration with small sizes."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        for pattern, size in SIZES.items():
            if re.fullmatch(pattern, name):
                return size
        return getattr(self.config, name)


def is_configuration(kind: object) -> bool:
    return inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedConfig)


def build(family: str, module: str, name: str) -> nn.Module:
    """The experts of a family with random weights, from the first of its configurations that has what they read."""
    folder = f"transformers.models.{family}"
    experts_class = getattr(importlib.import_module(f"{folder}.{module}"), name)
    configurations = importlib.import_module(f"{folder}.{module.replace('modeling', 'configuration')}")
    candidates = [kind() for kind in vars(configurations).values() if is_configuration(kind)]
    # First those that are of a mixture of experts.
    candidates.sort(key=lambda config: not any(re.fullmatch(r"\w*experts", name) for name in dir(config)))
    errors = []
    for config in candidates:
        try:
            experts: nn.Module = experts_class(SmallConfig(config))
        except (AttributeError, TypeError) as error:
            errors.append(error)
            continue
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        return experts
    raise AssertionError(f"no configuration of {family} fits {name}: {errors}")


def outcome(experts: Any, implementation: str, inputs: tuple[Tensor, ...]) -> Tensor:
    experts.config._experts_implementation = implementation
    out: Tensor = experts(*inputs)
    return out


def is_served(family: str, module: str, name: str) -> bool:
    """Passes if the result is eager's; False if it is refused in one sentence."""
    experts = build(family, module, name)
    hidden_states = torch.randn(20, HIDDEN)
    top_k_index = torch.rand(20, NUM_EXPERTS).argsort(1)[:, :TOP_K]
    inputs = (hidden_states, top_k_index, torch.rand(20, TOP_K))
    try:
        actual = outcome(experts, "zexpert", inputs)
    except ValueError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert re.fullmatch(rf'experts_implementation "zexpert" must have [^\n]+, got [^\n]* of {name}.*', reason)
        assert reason.count(". ") == 0
        return False
    plain = outcome(experts, "eager", inputs)
    exact = outcome(experts.double(), "eager", tuple(x.double() if x.is_floating_point() else x for x in inputs))
    assert_error_rule(actual, plain, exact)
    return True


@pytest.mark.parametrize(("family", "module", "name"), EXPERTS, ids=lambda value: value)
def test_equal_or_refused(family: str, module: str, name: str) -> None:
    is_served(family, module, name)


def test_most_families_are_served() -> None:
    """The plain ones, and LFM2-MoE, whose silu is a function."""
    served = [(family, name) for family, module, name in EXPERTS if is_served(family, module, name)]
    assert len(served) > 0.6 * len(EXPERTS) > 30
    assert {("qwen3_moe", "Qwen3MoeExperts"), ("deepseek_v3", "DeepseekV3Experts"), ("lfm2_moe", "Lfm2MoeExperts")} <= {
        *served
    }


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_oss", r"is_concatenated=True, got False of GptOssExperts"),
        ("nemotron_h", r"has_gate=True, got False of NemotronHExperts"),
        ("deepseek_v4", r"the usual gate, act\(gate\) \* up, got one of DeepseekV4Experts's own"),
        ("aria", r"is_transposed=False, got True of AriaExperts"),
    ],
)
def test_what_is_refused(family: str, reason: str) -> None:
    found = [(module, name) for other, module, name in EXPERTS if other == family]
    if not found:
        pytest.skip(f"this transformers has no {family}")
    for module, name in found:
        with pytest.raises(ValueError, match=reason):
            experts = build(family, module, name)
            outcome(experts, "zexpert", (torch.randn(2, HIDDEN), torch.zeros(2, 1).long(), torch.rand(2, 1)))
