# SPDX-License-Identifier: Apache-2.0
"""Trains one model with and without zero experts at equal feed-forward compute, several seeds each, and draws both.

Usage: python benchmarks/training_curves.py [--steps 300] [--seeds 3] [--text FILE] [--json PATH] [--plot PATH]

With zero experts every byte picks 6 of 32 feed-forward and 16 identity experts, held at 4 feed-forward experts on
average; without, 4 of 32. All else is equal: text, batches of a seed, learning rate, parameters in use per byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zexpert_tools.benchmark import harness, machine
from zexpert_tools.byte_decoder import ByteDecoder, ByteDecoderConfig
from zexpert_tools.text import load_text
from zexpert_tools.trainer import StepRecord, Trainer, TrainerConfig

MODELS = {
    "with zero experts": ByteDecoderConfig(),
    "without": ByteDecoderConfig(zero_expert_num=0, top_k=4),
}


def train(model_config: ByteDecoderConfig, text: Tensor, steps: int, seed: int) -> list[StepRecord]:
    torch.manual_seed(seed)
    trainer = Trainer(ByteDecoder(model_config), text, TrainerConfig(steps=steps, seed=seed))
    for _ in range(steps):
        trainer.train_step()
    return trainer.history


def held_out(history: Sequence[StepRecord]) -> list[tuple[int, float]]:
    return [
        (record.step, record.held_out_bits_per_byte) for record in history if record.held_out_bits_per_byte is not None
    ]


def plot(histories: dict[str, list[list[StepRecord]]], path: Path) -> None:
    """Held-out loss over the steps, a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for (name, runs), color in zip(histories.items(), ("tab:blue", "tab:orange"), strict=True):
        for seed, history in enumerate(runs):
            axis.plot(
                *zip(*held_out(history), strict=True), "o-", color=color, alpha=0.8, label=name if seed == 0 else ""
            )
    axis.set(
        xlabel="step",
        ylabel="held-out bits per byte (lower is better)",
        title="Equal feed-forward compute: 4 experts per byte and layer on average",
    )
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Training with and without zero experts at equal compute.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="file to train on (default: Python's documentation strings)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every step there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the held-out losses there")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seeds < 1:
        parser.error("--steps and --seeds must be positive")
    try:
        text = load_text(options.text, min_bytes=4096)
    except ValueError as error:
        parser.error(str(error))

    histories: dict[str, list[list[StepRecord]]] = {name: [] for name in MODELS}
    rows = []
    for seed in range(options.seeds):
        for name, config in MODELS.items():
            history = train(config, text, options.steps, seed)
            histories[name].append(history)
            slots = statistics.fmean(record.ffn_slots_per_token for record in history[len(history) // 2 :])
            rows.append([f"{name}, seed {seed}", f"{held_out(history)[-1][1]:.3f}", f"{slots:.2f}"])
            print(f"{rows[-1][0]}: {rows[-1][1]} bits per byte", flush=True)
    for name, runs in histories.items():
        last = [held_out(history)[-1][1] for history in runs]
        rows.append([f"{name}, mean", f"{statistics.fmean(last):.3f}", ""])
    print(harness.format_table(["model", "held-out bits per byte", "experts per byte, second half"], rows))
    if options.json is not None:
        record = {
            "environment": machine.environment(),
            "steps": options.steps,
            "histories": {
                name: [[dataclasses.asdict(step) for step in run] for run in runs] for name, runs in histories.items()
            },
        }
        options.json.write_text(json.dumps(record) + "\n")
    if options.plot is not None:
        plot(histories, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
