# SPDX-License-Identifier: Apache-2.0
"""Writes the input of run_layer: a scripted layer in LongCat-Flash's routing shape, tokens for it, and its output.

Usage: python save_layer.py FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import zexpert


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Writes layer.pt, tokens.pt and output.pt, which run_layer reads.")
    parser.add_argument("folder", type=Path, help="where; made if it is not there")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    block = zexpert.models.LongcatFlashMoE(
        zexpert.models.LongcatFlashConfig(
            hidden_size=256, expert_ffn_hidden_size=128, n_routed_experts=64, zero_expert_num=32, moe_topk=12
        )
    ).eval()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    hidden_states = torch.randn(16, 256)

    torch.jit.script(block).save(str(folder / "layer.pt"))
    torch.save(hidden_states, folder / "tokens.pt")
    torch.save(block(hidden_states), folder / "output.pt")


if __name__ == "__main__":
    main()
