# SPDX-License-Identifier: Apache-2.0
"""Pictures of a model's compute: coloured text for the terminal, maps and curves as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch
from rich.text import Text
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm, to_hex

from zexpert_tools.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from zexpert.telemetry import RoutingStats
    from zexpert_tools.trainer import StepRecord

COLOR_MAP = "cividis"  # ordered in lightness, so it also reads in grey and to colour-blind eyes


def save(figure: Figure, path: Path, *, dpi: int = 110) -> None:
    """Writes the picture, whole or not at all."""
    try:
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=dpi)
    finally:
        plt.close(figure)


def printable(byte: int) -> str:
    """One visible character for any byte: spaces and line ends become marks, others outside ASCII a dot."""
    marks = {ord(" "): "\u00b7", ord("\n"): "\u21b5", ord("\t"): "\u2192"}
    return marks.get(byte, chr(byte) if 33 <= byte <= 126 else ".")


def coloured_text(pieces: Sequence[str], ffn_slots: Tensor, top_k: int, *, colours: bool = True) -> Text:
    """A text of T tokens for the terminal, the background of each showing its mean over the layers of `ffn_slots`
    ([layers, T], feed-forward experts used). Colours span the values that occur, which is all that is said without
    `colours`."""
    means = ffn_slots.double().mean(dim=0)
    low, high = means.min().item(), means.max().item()
    color_map = plt.get_cmap(COLOR_MAP)
    shown = Text()

    def style(mean: float) -> str:
        if not colours:
            return ""
        share = (mean - low) / (high - low) if high > low else 0.5
        return f"{'black' if share > 0.5 else 'white'} on {to_hex(color_map(share))}"

    for piece, mean in zip(pieces, means.tolist(), strict=True):
        shown.append(piece.replace("\n", "\u21b5\n"), style=style(mean))
    if not shown.plain.endswith("\n"):
        shown.append("\n")
    chosen = f"of {top_k} chosen; the others were zero experts, which cost nothing"
    if not colours:
        shown.append(f"\nfeed-forward experts per token, mean over the layers: {low:.1f} to {high:.1f} {chosen}")
        return shown
    shown.append("\nfeed-forward experts per token, mean over the layers, from the least here to the most:  ")
    for step in range(5):
        mean = low + (high - low) * step / 4
        shown.append(f" {mean:.1f} ", style=style(mean))
    shown.append(f"  {chosen}")
    return shown


def draw_token_lines(
    figure: Figure,
    axes: Sequence[Axes],
    labels: Sequence[str],
    ffn_slots: Tensor,
    *,
    top_k: int,
    columns: int,
    label_size: int,
) -> None:
    """Draws the start of a text, a line of `columns` tokens per axis: each token's label under a column that shows the
    feed-forward experts it used in each layer (`ffn_slots`, [layers, T])."""
    num_layers = ffn_slots.shape[0]
    image = None
    for line, axis in enumerate(axes):
        part = slice(line * columns, (line + 1) * columns)
        counts = ffn_slots[:, part].double()
        image = axis.imshow(
            counts.numpy(),
            aspect="auto",
            cmap=COLOR_MAP,
            vmin=0,
            vmax=top_k,
            extent=(0, counts.shape[1], num_layers - 0.5, -0.5),
        )
        axis.set_xlim(0, columns)
        axis.set_xticks([i + 0.5 for i in range(counts.shape[1])], labels[part])
        axis.tick_params(axis="x", length=0, labelsize=label_size, labelfontfamily="monospace", pad=2)
        axis.set_yticks(range(num_layers) if num_layers <= 6 else [0, num_layers - 1])
        axis.tick_params(axis="y", labelsize=8)
        axis.set_ylabel("layer", fontsize=9)
        axis.spines[:].set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes), ticks=range(top_k + 1), pad=0.01, aspect=30)
    bar.set_label("feed-forward experts used")


def save_compute_map(
    path: Path, text: Tensor, ffn_slots: Tensor, *, top_k: int, all_ffn_slots: Tensor, target: float
) -> None:
    """Saves a heat map, text (uint8 [T]) by layer, of the feed-forward experts each byte used (`ffn_slots`,
    [layers, T]), over a histogram of `all_ffn_slots` ([layers, any]) with the target mean."""
    columns = 72
    lines = -(-text.numel() // columns)
    figure, axes = plt.subplots(
        lines + 1,
        1,
        figsize=(15, 1.05 * lines + 4.6),
        height_ratios=[*([1.0] * lines), 2.6],
        layout="constrained",
    )
    labels = [printable(byte) for byte in text.tolist()]
    draw_token_lines(figure, list(axes[:lines]), labels, ffn_slots, top_k=top_k, columns=columns, label_size=11)

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
    save(figure, path)


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
    save(figure, path)


def save_profile(path: Path, stats: Mapping[str, RoutingStats], *, top_k: int) -> None:
    """Saves three panels, a row per layer in each: how many tokens used how many feed-forward experts, their mean, and
    the load of every expert."""
    layers = list(stats.values())
    histogram = torch.stack([one.ffn_slots_histogram for one in layers]).double().cpu()
    shares = 100 * histogram / histogram.sum(dim=1, keepdim=True)
    load = torch.stack([one.expert_load for one in layers]).double().cpu()
    load = load / load.mean(dim=1, keepdim=True).clamp(min=1e-9)
    rows = range(len(layers))  # numbered from 0, as in the table
    figure, (shares_axis, mean_axis, load_axis) = plt.subplots(
        1, 3, figsize=(16, 2.4 + 0.35 * len(layers)), width_ratios=[3, 2, 5], layout="constrained", sharey=True
    )
    extent = (-0.5, top_k + 0.5, len(layers) - 0.5, -0.5)
    image = shares_axis.imshow(shares.numpy(), aspect="auto", cmap=COLOR_MAP, vmin=0, extent=extent)
    figure.colorbar(image, ax=shares_axis, label="% of tokens")
    shares_axis.set(xlabel=f"feed-forward experts a token used (of {top_k} chosen)", ylabel="layer", title="Compute")
    shares_axis.set_xticks(range(top_k + 1))

    means = [float(one.mean_ffn_slots) for one in layers]
    mean_axis.barh(rows, means, color="tab:blue", height=0.7)
    overall = sum(means) / len(means)
    mean_axis.axvline(overall, color="tab:red", label=f"mean {overall:.2f}")
    mean_axis.set(xlabel="feed-forward experts per token", xlim=(0, top_k), title="Mean")
    mean_axis.legend(loc="lower right", framealpha=0.9)

    most = max(2.0, float(load.max()))
    image = load_axis.imshow(
        load.numpy(), aspect="auto", cmap="coolwarm", norm=TwoSlopeNorm(1.0, 0.0, most),
        extent=(-0.5, load.shape[1] - 0.5, len(layers) - 0.5, -0.5),
    )  # fmt: skip
    figure.colorbar(image, ax=load_axis, label="load over the layer's mean")
    load_axis.set(xlabel="feed-forward expert", title="Load: red experts do more than their share, blue ones less")
    shares_axis.set_yticks([row for row in rows if len(layers) <= 20 or row % 5 == 0])
    tokens = int(histogram[0].sum())
    figure.suptitle(f"Where the model spends its compute, {tokens:,} tokens", fontsize=13)
    save(figure, path)


def save_token_map(path: Path, pieces: Sequence[str], ffn_slots: Tensor, *, top_k: int) -> None:
    """Saves the start of a text (T tokens), each token over a column that shows how many feed-forward experts it used
    in each layer (`ffn_slots`, [layers, T])."""
    is_bytes = all(len(piece) == 1 for piece in pieces)
    columns, most_lines = (72, 6) if is_bytes else (18, 10)
    lines = min(most_lines, -(-len(pieces) // columns))
    height = 1.2 + (0.75 + 0.05 * ffn_slots.shape[0]) * lines
    figure, panels = plt.subplots(lines, 1, figsize=(15, height), layout="constrained", squeeze=False)
    labels = [printable(ord(piece)) if is_bytes else label(piece) for piece in pieces[: lines * columns]]
    size = 11 if is_bytes else 8
    draw_token_lines(figure, list(panels[:, 0]), labels, ffn_slots, top_k=top_k, columns=columns, label_size=size)
    figure.suptitle(f"A column is a token of the text, a row a layer; every token chose {top_k} experts", fontsize=13)
    save(figure, path)


def label(piece: str) -> str:
    """A token as a tick: spaces and line ends visible, long ones cut; no formula."""
    shown = piece.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("$", r"\$")
    return shown if len(shown) <= 9 else shown[:8] + "\u2026"


def smoothed(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (as in Adam, arXiv 1412.6980)."""
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + (1 - memory)
        result.append(total / weight)
    return result
