# SPDX-License-Identifier: Apache-2.0
"""Trains a small decoder with feed-forward and identity experts (LongCat-Flash, arXiv 2509.01322), saves it, and prints
the load of its experts.

Usage: python examples/train.py [--text FILE] [--steps 200] [--target 3] [--out train.pt] [--seed 0]

zexpert_tools.trainer.Trainer makes the steps: next-byte loss, AdamW, and a LongCatBiasController, which moves the
selection biases so that bytes use --target networks on the mean and every network gets its share. docs/training.md
has such a loop for your own model. `zexpert generate --checkpoint train.pt` lets the decoder write.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from zexpert_tools.byte_decoder import ByteDecoder, ByteDecoderConfig
from zexpert_tools.checkpoint import save_checkpoint
from zexpert_tools.text import load_text
from zexpert_tools.trainer import Trainer, TrainerConfig

CONFIG = ByteDecoderConfig(
    hidden_size=64,
    num_layers=2,
    context_length=128,
    num_experts=16,
    zero_expert_num=8,
    top_k=4,
    intermediate_size=64,
    routed_scaling_factor=2.0,
)


def print_load(trainer: Trainer) -> None:
    """What the routing of the held-out text was, a line per layer."""
    for stats in trainer.routing_stats.values():
        stats.reset()
    with torch.no_grad():
        trainer.model.eval()(trainer.held_out_windows()[:, :-1])
    print("held-out text   networks per byte   zero experts   largest load / mean   entropy of the load / largest")
    for name, stats in trainer.routing_stats.items():
        print(
            f"{name:<14}{stats.mean_ffn_slots:11.2f} of {CONFIG.top_k}{stats.zero_rate:15.0%}"
            f"{stats.load_imbalance:22.2f}{stats.normalized_load_entropy:32.3f}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's own documentation strings")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--target", type=float, default=3.0, help=f"networks per byte, between 0 and {CONFIG.top_k}")
    parser.add_argument("--out", type=Path, default=Path("train.pt"), help="the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if not 0 < options.target < CONFIG.top_k:
        parser.error(f"--target must be between 0 and {CONFIG.top_k}, got {options.target}")
    if not options.out.resolve().parent.is_dir():
        parser.error(f"--out must be in a folder that exists, got {options.out}")

    torch.manual_seed(options.seed)
    settings = TrainerConfig(steps=options.steps, target_ffn_experts=options.target, seed=options.seed)
    try:
        text = load_text(options.text, min_bytes=10 * (CONFIG.context_length + 1))
    except ValueError as error:
        parser.error(str(error))
    trainer = Trainer(ByteDecoder(CONFIG), text, settings)
    for _ in range(options.steps):
        record = trainer.train_step()
        if record.held_out_bits_per_byte is not None:
            print(
                f"step {record.step}: {record.held_out_bits_per_byte:.2f} bits per byte of held-out text, "
                f"{record.ffn_slots_per_token:.2f} networks per byte of the batch"
            )
    print_load(trainer)
    save_checkpoint(trainer, options.out)
    print(f"saved {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
