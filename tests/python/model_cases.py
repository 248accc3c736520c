# SPDX-License-Identifier: Apache-2.0
"""What the tests of model blocks share: the parts of a mixture of experts written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zexpert.models import (
    LongcatFlashConfig,
    LongcatFlashMoE,
    MoEPlusPlusBlock,
    MoEPlusPlusConfig,
    ZedaGlm4Config,
    ZedaGlm4MoE,
    ZedaQwen3Config,
    ZedaQwen3MoE,
)

#: What transformers' LongcatFlashConfig has beside its experts, for a decoder that is soon made.
TINY_DECODER = {
    "num_layers": 2,
    "vocab_size": 50,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 8,
}

#: What one expert does with one token, [H] -> [H].
Expert = Callable[[Tensor], Tensor]


def ffn_expert(gate: Tensor, up: Tensor, down: Tensor) -> Expert:
    """A feed-forward expert in the dtype of the token it is given."""

    def expert(x: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(gate.to(x.dtype) @ x) * (up.to(x.dtype) @ x)
        return down.to(x.dtype) @ hidden

    return expert


def stacked_experts(gate_up: Tensor, down: Tensor) -> list[Expert]:
    """Experts from gate_up [R, 2F, H], gate rows first, and down [R, H, F]."""
    return [ffn_expert(*both.chunk(2), last) for both, last in zip(gate_up, down, strict=True)]


def mixture(x: Tensor, weights: Tensor, choices: Tensor, experts: list[Expert]) -> Tensor:
    """[T, H]: each token's sum over its chosen experts, slot by slot, in the dtype of x."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for weight, choice in zip(weights[t], choices[t].tolist(), strict=True):
            out[t] += weight.to(x.dtype) * experts[choice](x[t])
    return out


def clear_rows(keys: Tensor, top_k: int, gap: float = 1e-5) -> Tensor:
    """[T] bool: the K-th and the next key are too far apart for rounding to change who is chosen. A random case that
    is mostly unclear tests nothing."""
    largest = keys.double().topk(top_k + 1, dim=-1).values
    clear = largest[:, top_k - 1] - largest[:, top_k] > gap
    assert clear.double().mean() > 0.75
    return clear


def as_module_list(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint with stacked experts as one with a list of modules, of the experts that have a down_proj."""
    listed = {name: weight for name, weight in weights.items() if not name.startswith("experts.")}
    for i, (gate_up, down) in enumerate(
        zip(weights["experts.gate_up_proj"], weights["experts.down_proj"], strict=False)
    ):
        gate, up = gate_up.chunk(2)
        listed |= {f"experts.{i}.gate_proj.weight": gate, f"experts.{i}.up_proj.weight": up}
        listed[f"experts.{i}.down_proj.weight"] = down
    return listed


# ---- Every block, small ---------------------------------------------------------------------------------------------

HIDDEN, INTERMEDIATE, REAL = 16, 12, 6
BLOCKS: dict[str, tuple[Any, Any]] = {
    "longcat": (LongcatFlashMoE, LongcatFlashConfig(HIDDEN, INTERMEDIATE, REAL, zero_expert_num=3, moe_topk=4)),
    "moe++": (
        MoEPlusPlusBlock,
        MoEPlusPlusConfig(
            HIDDEN, INTERMEDIATE, REAL, num_constant_experts=3, num_copy_experts=2, num_zero_experts=2, top_k=4
        ),
    ),
    "qwen3": (ZedaQwen3MoE, ZedaQwen3Config(HIDDEN, INTERMEDIATE, REAL, num_zero_experts=3, num_experts_per_tok=4)),
    "glm4": (
        ZedaGlm4MoE,
        ZedaGlm4Config(HIDDEN, INTERMEDIATE, REAL, num_zero_experts=3, n_group=2, topk_group=1, num_experts_per_tok=3),
    ),
}


def make_blocks(name: str, **options: Any) -> nn.ModuleList:
    """Two blocks, in float64 and seeded alike."""
    block, config = BLOCKS[name]
    torch.manual_seed(0)
    blocks = nn.ModuleList(block(config, params_dtype=torch.float64, **options) for _ in range(2))
    for buffer_name, buffer in blocks.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return blocks
