# SPDX-License-Identifier: Apache-2.0
"""Drop experts for a trained mixture of experts (ZEDA, arXiv 2605.18643): the block gets experts that do nothing, and
learns which tokens can do with fewer networks.

Usage: python examples/add_drop_experts.py [--steps 300] [--target 3] [--seed 0]

The block is Qwen3's, small and with random weights, its tokens are of a mixture of clusters; the untouched block is the
teacher. The loss is the distance from its output plus group_loss, which pulls the mean number of networks per token to
the target.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from zexpert.models import ZedaQwen3Config, ZedaQwen3MoE
from zexpert.models.zeda import extend_router
from zexpert.telemetry import track_routing
from zexpert.training import group_loss

HIDDEN, REAL, DROP, TOP_K = 32, 16, 8, 4
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": 32, "num_experts": REAL, "num_experts_per_tok": TOP_K}


def with_drop_experts(teacher: ZedaQwen3MoE) -> ZedaQwen3MoE:
    """A block with the teacher's weights and rows for drop experts in its router."""
    weights = teacher.state_dict()
    weights["gate.weight"] = extend_router(weights["gate.weight"], DROP)
    return ZedaQwen3MoE.from_state_dict(ZedaQwen3Config(**SIZES, num_zero_experts=DROP), weights)


def measure(student: ZedaQwen3MoE, teacher: ZedaQwen3MoE, tokens: Tensor) -> tuple[float, float]:
    """Networks per token, and the distance from the teacher's output relative to that output."""
    with torch.no_grad():
        routing = student.experts.router.select_experts(tokens, student.gate(tokens))
        wanted = teacher(tokens)
        distance = float((student(tokens) - wanted).norm() / wanted.norm())
    return float((routing.topk_ids >= 0).sum(dim=1).float().mean()), distance


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--target", type=float, default=3.0, help=f"networks per token, between 0 and {TOP_K}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < 0:
        parser.error(f"--steps must be at least 0, got {options.steps}")
    if not 0 < options.target < TOP_K:
        parser.error(f"--target must be between 0 and {TOP_K}, got {options.target}")

    torch.manual_seed(options.seed)
    centres = 2.0 * torch.randn(64, HIDDEN)

    def draw(count: int) -> Tensor:
        return centres[torch.randint(len(centres), (count,))] + 0.3 * torch.randn(count, HIDDEN)

    teacher = ZedaQwen3MoE(ZedaQwen3Config(**SIZES, num_zero_experts=0)).requires_grad_(False)
    torch.nn.init.normal_(teacher.gate.weight, std=0.3)
    student = with_drop_experts(teacher)
    held_out = draw(2000)
    networks, distance = measure(student, teacher, held_out)
    print(f"teacher   {TOP_K:.2f} networks per token")
    print(f"injected  {networks:.2f} networks per token, output off by {distance:.0%}")

    stats = next(iter(track_routing(student).values()))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, max(options.steps, 1))
    for _ in range(options.steps):
        tokens = draw(512)
        stats.reset()
        wanted = teacher(tokens)
        loss = F.mse_loss(student(tokens), wanted) / wanted.square().mean()
        loss = loss + 0.3 * group_loss(
            student.gate(tokens), stats.expert_load, stats.num_tokens, TOP_K, target_ffn_experts=options.target
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    networks, distance = measure(student, teacher, held_out)
    print(f"adapted   {networks:.2f} networks per token, output off by {distance:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
