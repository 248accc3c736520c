# SPDX-License-Identifier: Apache-2.0
"""Pictures of benchmark results. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from zexpert_tools.benchmark.harness import CaseResult, counted, format_seconds
from zexpert_tools.benchmark.layer import LayerResult
from zexpert_tools.benchmark.rates import Limits
from zexpert_tools.pictures import save


def save_roofline(path: Path, results: Sequence[LayerResult], limits: Limits, *, device_name: str) -> None:
    """Reached operations per second over operations per byte of the weights used, under the device's two limits
    (the roofline of Williams, Waterman and Patterson, 2009). A contender has a colour, a model's sizes a marker."""
    results = [result for result in results if result.num_bytes]
    figure, axes = plt.subplots(figsize=(10, 6.4), layout="constrained")
    intensities = [result.operations / result.num_bytes for result in results]
    ridge = limits.rate / limits.bandwidth
    low, high = min([ridge / 4, *intensities]) / 4, max([ridge * 4, *intensities]) * 2
    roof = [low * limits.bandwidth / 1e12, limits.rate / 1e12, limits.rate / 1e12]
    legend = axes.loglog([low, ridge, high], roof, color="0.75", linewidth=4, label="the most this machine can do")
    axes.axvline(ridge, color="0.85", zorder=0)
    axes.set_xlim(low, high)
    text: dict[str, Any] = {"va": "bottom", "fontsize": 9, "color": "0.4", "transform": axes.get_xaxis_transform()}
    axes.text(
        ridge / 1.1, 0.01, "few tokens: the memory is the limit,\nweights cannot come any faster", ha="right", **text
    )
    axes.text(ridge * 1.1, 0.01, "many tokens: arithmetic is the limit,\nproducts cannot go any faster", **text)

    models = list(dict.fromkeys(result.name for result in results))
    markers = dict(zip(models, itertools.cycle("os^Dv*X")))
    subjects = dict.fromkeys(result.subject for result in results)
    contenders = dict.fromkeys([*subjects, *(name for result in results for name in result.timings)])
    for index, name in enumerate(contenders):
        subject = name in subjects
        style: dict[str, Any] = {"color": f"C{index}", "linestyle": "-" if subject else "--"}
        legend.append(Line2D([], [], label=name, **style))
        for model in models:
            own = [result for result in results if result.name == model and name in result.timings]
            x = [result.operations / result.num_bytes for result in own]
            y = [result.operations / result.timings[name].median / 1e12 for result in own]
            axes.plot(x, y, marker=markers[model], label=f"{name}, {model}", zorder=3 if subject else 2, **style)
            # Labels of several models would cover each other.
            for at_x, at_y, result in zip(x, y, own, strict=True) if subject and len(models) == 1 else ():
                share = 100 * result.floor / result.timings[name].median
                tokens = f"{counted(result.num_tokens, 'token')}: {share:.0f}%"
                place: dict[str, Any] = {"xytext": (-6, 4), "textcoords": "offset points", "ha": "right"}
                axes.annotate(tokens, (at_x, at_y), fontsize=8, **place)
    legend += [Line2D([], [], color="0.4", linestyle="", marker=markers[model], label=model) for model in models]
    axes.set_xlabel("operations per byte of weights read (more tokens share each expert's weights: further right)")
    axes.set_ylabel("TFLOP/s reached (higher is better)")
    title = (
        f"{device_name}\nThe grey line is the most this machine can do, measured: memory at "
        f"{limits.bandwidth / 1e9:,.0f} GB/s, products at {limits.rate / 1e12:,.2f} TFLOP/s."
    )
    if len(models) == 1:
        title += "\nThe percentage at a point is how near it comes to the line."
    axes.set_title(title, fontsize=10)
    axes.legend(handles=legend, fontsize=9, loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, dpi=120)


def save_bars(path: Path, results: Sequence[CaseResult], limits: Limits, *, device_name: str) -> None:
    """Median time of every contender, quartiles as a whisker, and the floor as a line, a panel per case."""
    count = max(len(results), 1)
    figure, panels = plt.subplots(count, 1, figsize=(9, 1.3 + 1.5 * count), layout="constrained", squeeze=False)
    for axes, result in zip(panels[:, 0], results, strict=False):
        names = list(result.timings)
        medians = [1e6 * result.timings[name].median for name in names]
        spread = [
            [1e6 * (timing.median - timing.lower_quartile) for timing in result.timings.values()],
            [1e6 * (timing.upper_quartile - timing.median) for timing in result.timings.values()],
        ]
        colors = ["tab:blue" if name == result.subject else "0.7" for name in names]
        bars = axes.barh(names, medians, xerr=spread, color=colors, height=0.6, ecolor="0.3")
        axes.bar_label(bars, [f" {format_seconds(median / 1e6)}" for median in medians], fontsize=8)
        axes.axvline(1e6 * result.floor, color="tab:red")
        axes.set_title(f"{result.case} (red: the floor, {format_seconds(result.floor)})", fontsize=9, loc="left")
        axes.set_xlim(0, 1.2 * max(medians))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("microseconds, median and quartiles (shorter is better)")
    figure.suptitle(
        f"{device_name}\nThe floor is the time to move the data at the memory's measured "
        f"{limits.bandwidth / 1e9:,.0f} GB/s.",
        fontsize=10,
    )
    save(figure, path, dpi=120)
