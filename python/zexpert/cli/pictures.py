"""Pictures of a training run: where the model spends its compute, and how it learnt to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from rich.text import Text
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

if TYPE_CHECKING:
    from zexpert.training.trainer import StepRecord

COLOR_MAP = "cividis"  # ordered in lightness, so it also reads in grey and to colour-blind eyes


def printable(byte: int) -> str:
    """One visible character for any byte: spaces and line ends become marks, others outside ASCII a dot."""
    marks = {ord(" "): "\u00b7", ord("\n"): "\u21b5", ord("\t"): "\u2192"}
    return marks.get(byte, chr(byte) if 33 <= byte <= 126 else ".")


def coloured_text(text: Tensor, ffn_slots: Tensor, top_k: int) -> Text:
    """`text` (uint8 [T]) for the terminal, the background of each byte showing its mean over the layers of `ffn_slots`
    ([layers, T], feed-forward experts used). Colours span the values that occur."""
    means = ffn_slots.double().mean(dim=0)
    low, high = means.min().item(), means.max().item()
    colors = plt.get_cmap(COLOR_MAP)
    shown = Text()

    def style(mean: float) -> str:
        share = (mean - low) / (high - low) if high > low else 0.5
        return f"{'black' if share > 0.5 else 'white'} on {to_hex(colors(share))}"

    for byte, mean in zip(text.tolist(), means.tolist(), strict=True):
        character = chr(byte) if 32 <= byte <= 126 else ("\u21b5\n" if byte == 10 else ".")
        shown.append(character, style=style(mean))
    shown.append("\n\nfeed-forward experts per byte, mean over the layers, from the least here to the most:  ")
    for step in range(5):
        mean = low + (high - low) * step / 4
        shown.append(f" {mean:.1f} ", style=style(mean))
    shown.append(f"  of {top_k} chosen; the others were zero experts, which cost nothing")
    return shown


def save_compute_map(
    path: Path, text: Tensor, ffn_slots: Tensor, *, top_k: int, all_ffn_slots: Tensor, target: float
) -> None:
    """Saves a heat map, text (uint8 [T]) by layer, of the feed-forward experts each byte used (`ffn_slots`,
    [layers, T]), over a histogram of `all_ffn_slots` ([layers, any]) with the target mean."""
    columns = 72
    num_layers = ffn_slots.shape[0]
    lines = -(-text.numel() // columns)
    figure, axes = plt.subplots(
        lines + 1,
        1,
        figsize=(15, 1.05 * lines + 4.6),
        height_ratios=[*([1.0] * lines), 2.6],
        layout="constrained",
    )
    image = None
    for line in range(lines):
        axis = axes[line]
        part = slice(line * columns, (line + 1) * columns)
        counts = ffn_slots[:, part].double()
        image = axis.imshow(
            counts.numpy(),
            aspect="auto",
            cmap=COLOR_MAP,
            vmin=0,
            vmax=top_k,
            extent=(0, counts.shape[1], num_layers + 0.5, 0.5),
        )
        axis.set_xlim(0, columns)
        axis.set_xticks([i + 0.5 for i in range(counts.shape[1])], [printable(byte) for byte in text[part].tolist()])
        axis.tick_params(axis="x", length=0, labelsize=11, labelfontfamily="monospace", pad=2)
        axis.set_yticks(range(1, num_layers + 1))
        axis.tick_params(axis="y", labelsize=8)
        axis.set_ylabel("layer", fontsize=9)
        axis.spines[:].set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes[:lines]), ticks=range(top_k + 1), pad=0.01, aspect=30)
    bar.set_label("feed-forward experts used")

    axis = axes[-1]
    values = range(top_k + 1)
    shares = [100 * (all_ffn_slots == value).double().mean().item() for value in values]
    colors = plt.get_cmap(COLOR_MAP)
    axis.bar(values, shares, color=[colors(value / top_k) for value in values], edgecolor="0.3", width=0.85)
    mean = all_ffn_slots.double().mean().item()
    axis.axvline(mean, color="tab:red", label=f"mean {mean:.2f}")
    axis.axvline(target, color="tab:red", linestyle="--", label=f"target {target:.2f}")
    axis.set_xticks(list(values))
    axis.set_xlabel(f"feed-forward experts used by a byte in a layer (of {top_k} chosen; the others are zero experts)")
    axis.set_ylabel("% of bytes and layers")
    axis.set_title(f"Over {all_ffn_slots.shape[1]:,} bytes of held-out text", fontsize=11)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Where the model spends its compute: a column is a byte of held-out text (\u00b7 a space, \u21b5 a line's "
        "end), a row a layer",
        fontsize=13,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_training_curves(path: Path, history: Sequence[StepRecord], *, top_k: int, target: float) -> None:
    """Saves loss and mean feed-forward experts per byte over the steps."""
    figure, (loss_axis, slots_axis) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    steps = [record.step for record in history]
    loss_axis.plot(
        steps,
        [record.bits_per_byte for record in history],
        color="0.75",
        linewidth=0.8,
        label="training text, each step",
    )
    loss_axis.plot(
        steps, smoothed([record.bits_per_byte for record in history]), label="training text, smoothed", color="tab:blue"
    )
    held_out = [(record.step, record.held_out_bits_per_byte) for record in history if record.held_out_bits_per_byte]
    if held_out:
        loss_axis.plot(*zip(*held_out, strict=True), "o-", label="held-out text", color="tab:orange")
    loss_axis.set(xlabel="step", ylabel="bits per byte (lower is better)", title="How well the next byte is predicted")
    loss_axis.legend(frameon=False)

    slots_axis.plot(steps, [record.ffn_slots_per_token for record in history], color="tab:blue", label="measured")
    slots_axis.axhline(target, color="tab:red", linestyle="--", label=f"target {target:.2f}")
    slots_axis.axhspan(0.95 * target, 1.05 * target, color="tab:red", alpha=0.1, label="target \u00b1 5%")
    slots_axis.set(
        xlabel="step",
        ylabel=f"experts per byte and layer (of {top_k} chosen)",
        title="Feed-forward experts used: a controller moves the mean",
        ylim=(0, top_k),
    )
    slots_axis.legend(frameon=False)
    for axis in (loss_axis, slots_axis):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smoothed(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (as in Adam, arXiv 1412.6980)."""
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + (1 - memory)
        result.append(total / weight)
    return result
