# SPDX-License-Identifier: Apache-2.0
"""Training of a ByteDecoder: next-byte loss, AdamW, and the bias controller that holds the feed-forward compute."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zexpert.telemetry import track_routing
from zexpert.training import LongCatBiasController
from zexpert_tools.byte_decoder import ByteDecoder


@dataclass(frozen=True)
class TrainerConfig:
    """How a ByteDecoder is trained. The learning rate rises over `warmup_steps`, then falls to a tenth as a cosine."""

    steps: int = 450
    batch_size: int = 12
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    weight_decay: float = 0.1
    target_ffn_experts: float = 4.0  # mean number of feed-forward experts per token and layer
    bias_update_rate: float = 0.1
    held_out_every: int = 50
    seed: int = 0


@dataclass
class StepRecord:
    """Measurements of one training step. `held_out_bits_per_byte` is measured at some steps only."""

    step: int
    bits_per_byte: float
    ffn_slots_per_token: float
    held_out_bits_per_byte: float | None = None

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> StepRecord:
        """The inverse of dataclasses.asdict."""
        held_out = record["held_out_bits_per_byte"]
        return cls(
            int(record["step"]),
            float(record["bits_per_byte"]),
            float(record["ffn_slots_per_token"]),
            None if held_out is None else float(held_out),
        )


def split_text(text: Tensor, held_out_share: float = 0.1) -> tuple[Tensor, Tensor]:
    """The first part of `text` (uint8 [n]) to train on, the last to measure on."""
    boundary = int(text.numel() * (1 - held_out_share))
    return text[:boundary], text[boundary:]


class Trainer:
    """Trains `model` on `text` (uint8 [n]).

    state_dict() has all state, the random generator's included: on the same machine a resumed run equals an
    uninterrupted one bit by bit.
    """

    def __init__(self, model: ByteDecoder, text: Tensor, config: TrainerConfig) -> None:
        self.model = model
        self.config = config
        self.train_text, self.held_out_text = split_text(text)
        window = model.config.context_length + 1
        if self.held_out_text.numel() < window:
            raise ValueError(f"text must be at least {10 * window} bytes long, got {text.numel()}")
        decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.routing_stats = track_routing(model)
        # Without zero experts every slot is a feed-forward expert, and the controller only evens their load.
        target = config.target_ffn_experts if model.config.zero_expert_num else float(model.config.top_k)
        self.controller = LongCatBiasController(config.bias_update_rate, target)
        self.history: list[StepRecord] = []

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history)

    def learning_rate(self, step: int) -> float:
        """The learning rate of the step after `step` others."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))

    def train_step(self) -> StepRecord:
        """One optimiser step, then one of the bias controller; the record is also added to `history`."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.model.train()
        inputs, targets = self._batch()
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

        ffn_slots = torch.stack([stats.mean_ffn_slots for stats in self.routing_stats.values()]).mean()
        record = StepRecord(self.step + 1, loss.item() / math.log(2), ffn_slots.item())
        self.controller.update(self.model)
        self.history.append(record)
        if self.step % config.held_out_every == 0 or self.step == config.steps:
            record.held_out_bits_per_byte = self.held_out_bits_per_byte()
        return record

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Windows of the text, int64 [B, context_length], and the same windows one byte later."""
        length = self.model.config.context_length
        starts = torch.randint(self.train_text.numel() - length, (self.config.batch_size,), generator=self.generator)
        windows = self.train_text[starts[:, None] + torch.arange(length + 1)].long().to(self.device)
        return windows[:, :-1], windows[:, 1:]

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def held_out_windows(self, most: int = 32) -> Tensor:
        """At most `most` windows spread evenly over the held-out text, int64 [B, context_length + 1]."""
        length = self.model.config.context_length + 1
        count = min(most, self.held_out_text.numel() // length)
        starts = torch.linspace(0, self.held_out_text.numel() - length, count).long()
        return self.held_out_text[starts[:, None] + torch.arange(length)].long().to(self.device)

    @torch.no_grad()
    def held_out_bits_per_byte(self) -> float:
        """Mean loss on the held-out windows, in bits. The routing counts are left as they were."""
        self.model.eval()
        windows = self.held_out_windows()
        logits = self.model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        for stats in self.routing_stats.values():
            stats.reset()
        return loss.item() / math.log(2)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain values and tensors (torch.load's weights_only accepts them)."""
        return {
            "model_config": self.model.config.to_dict(),
            "trainer_config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "history": [dataclasses.asdict(record) for record in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`, made by a trainer of the same model configuration and text."""
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.generator.set_state(state_dict["generator"].cpu())
        self.history = [StepRecord.from_dict(record) for record in state_dict["history"]]
