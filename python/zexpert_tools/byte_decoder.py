# SPDX-License-Identifier: Apache-2.0
"""A small byte-level decoder with LongCat-Flash's kind of mixture-of-experts layers.

Every token picks `top_k` of `num_experts` feed-forward and `zero_expert_num` identity experts (softmax in float32, a
selection bias, no renormalisation: LongCat-Flash, arXiv 2509.01322). So the model decides how much compute a byte
gets. Attention is torch's scaled_dot_product_attention with rotary positions (arXiv 2104.09864). It trains
on a CPU in minutes. Only the vocabulary of 256 is specific to bytes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zexpert import FusedMoE


@dataclass(frozen=True)
class ByteDecoderConfig:
    """Sizes of a ByteDecoder. `zero_expert_num=0` gives an ordinary mixture of experts.

    Raises:
        ValueError: a size is not a positive integer, the factor is not finite, or a head's size is not even.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    context_length: int = 256
    num_experts: int = 32
    zero_expert_num: int = 16
    top_k: int = 6
    intermediate_size: int = 128
    routed_scaling_factor: float = 4.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name != "zero_expert_num")
            if field.type == "int" and (type(value) is not int or value < least):
                raise ValueError(f"{field.name} must be an integer of at least {least}, got {value!r}")
            if field.type == "float" and (type(value) not in (int, float) or not math.isfinite(value)):
                raise ValueError(f"{field.name} must be a finite number, got {value!r}")
        if self.hidden_size % (2 * self.num_heads) != 0:
            raise ValueError(f"hidden_size must be a multiple of 2 * num_heads, got {self.hidden_size}")

    def to_dict(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)


class CausalAttention(nn.Module):
    """Multi-head causal self-attention with rotary positions: [B, T, H] -> [B, T, H]."""

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ByteDecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_size = config.hidden_size // config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, self.head_size, 2, dtype=torch.float64) / self.head_size)
        angles = torch.outer(torch.arange(config.context_length, dtype=torch.float64), frequencies)
        self.register_buffer("rotary_cos", angles.cos().float(), persistent=False)
        self.register_buffer("rotary_sin", angles.sin().float(), persistent=False)

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotates the pairs (x_i, x_{i + d/2}) of [B, heads, T, d] by their position's angles."""
        cos, sin = self.rotary_cos[: x.shape[2]].to(x.dtype), self.rotary_sin[: x.shape[2]].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_size)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self._rotate(query), self._rotate(key), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention, then the mixture of experts, each behind an RMSNorm and added to its input."""

    def __init__(self, config: ByteDecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = CausalAttention(config)
        self.moe_norm = nn.RMSNorm(config.hidden_size)
        total = config.num_experts + config.zero_expert_num
        self.classifier = nn.Linear(config.hidden_size, total, bias=False)
        zero_experts = {"zero_expert_type": "identity", "zero_expert_num": config.zero_expert_num}
        self.moe = FusedMoE(
            num_experts=config.num_experts,
            top_k=config.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            e_score_correction_bias=torch.zeros(total),
            scoring_func="softmax",
            renormalize=False,
            routed_scaling_factor=config.routed_scaling_factor,
            **(zero_experts if config.zero_expert_num else {}),  # type: ignore[arg-type]
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states))
        normed = self.moe_norm(hidden_states)
        router_logits = F.linear(normed.float(), self.classifier.weight.float())
        return hidden_states + self.moe(normed, router_logits)  # type: ignore[no-any-return]


class ByteDecoder(nn.Module):
    """Next-byte prediction: bytes [B, T] (uint8 or int64, T <= context_length) -> logits [B, T, 256]."""

    def __init__(self, config: ByteDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(256, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"tokens must be at most context_length ({self.config.context_length}) long, got {tokens.shape[1]}"
            )
        hidden_states = self.embedding(tokens.long())
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return F.linear(self.norm(hidden_states), self.embedding.weight)

    def moe_layers(self) -> list[FusedMoE]:
        """The mixture-of-experts layers, first to last."""
        return [layer.moe for layer in self.layers]  # type: ignore[misc]

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, length: int, *, temperature: float = 0.8, generator: torch.Generator | None = None
    ) -> Tensor:
        """`prompt` (uint8 [P], P >= 1) and `length` sampled bytes after it; temperature 0 picks the likeliest byte."""
        if prompt.numel() == 0:
            raise ValueError("prompt must hold at least one byte")
        text = prompt.long()
        for _ in range(length):
            logits = self(text[None, -self.config.context_length :])[0, -1].float()
            if temperature > 0:
                # In float64, the largest at 0: the smallest temperature gives no NaN.
                scaled = (logits.double() - logits.max()) / temperature
                # Sample on the CPU: its generator gives the same bytes on every device.
                probabilities = torch.softmax(scaled, dim=-1).float().cpu()
                following = torch.multinomial(probabilities, 1, generator=generator).to(text.device)
            else:
                following = logits.argmax(dim=-1, keepdim=True)
            text = torch.cat((text, following))
        return text.to(torch.uint8)
