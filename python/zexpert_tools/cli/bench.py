# SPDX-License-Identifier: Apache-2.0
"""`zexpert bench`: times of the operators and the layer on this machine, compared with what else is installed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zexpert_tools.benchmark import epilogue, harness, layer, machine, rates, routing
from zexpert_tools.cli.terminal import (
    DeviceOption,
    choose_device,
    console,
    fail,
    parse_positive_ints,
    print_table,
    progress,
)
from zexpert_tools.files import prepare_folder


class Suite(str, Enum):
    """What can be measured."""

    routing = "routing"
    epilogue = "epilogue"
    layer = "layer"
    training = "training"


#: Tokens of a run without --tokens, by device.
TOKENS = {"cpu": [1, 16, 256], "cuda": [1, 16, 256, 4096, 16384]}
TRAINING_TOKENS = [256]

PICTURE_BYTES = 1 << 20

#: A case is repeated so often, with the limits measured anew, while a contender beats its floor.
MOST_REPETITIONS = 3


def bench(
    suite: Annotated[
        Suite,
        typer.Argument(
            help="routing: the choice of experts. epilogue: the weighted sum of a token's expert rows. layer: from "
            "hidden states to the layer's output. training: the layer and its backward."
        ),
    ] = Suite.layer,
    model: Annotated[
        str | None,
        typer.Option(help=f"Sizes of {', '.join(layer.MODELS)}. Default: small on a CPU, longcat-flash on a GPU."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, such as 1,16,256.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: by device and suite.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed repetitions. Default: 15, 5 for training.")] = None,
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, max=os.cpu_count(), help="CPU threads. Default: PyTorch's.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also draw a picture into this file: .png, .pdf or .svg.")
    ] = None,
) -> None:
    """Time routing, epilogue, layer or training step, and PyTorch and others at the same work.

    Every output is checked against float64. The floor is the least time that
    this machine's memory and arithmetic, measured in the same run, allow.
    Exit code 1: an output is wrong.
    """
    chosen = choose_device(device)
    shape = layer.MODELS.get(name := model or ("longcat-flash" if chosen.type == "cuda" else "small"))
    if shape is None:
        raise fail(f"--model must be one of {', '.join(layer.MODELS)}, got {name}")
    training = suite is Suite.training
    numbers = (
        parse_positive_ints("--tokens", tokens)
        if tokens is not None
        else TRAINING_TOKENS
        if training
        else TOKENS[chosen.type]
    )
    times = repeats or (5 if training else 15)
    kind = parse_dtype(dtype, suite, chosen)
    if plot is not None and not plot.parent.is_dir():
        raise fail(f"--plot must be in a folder that exists, got {plot}")
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise fail(f"--plot must end in .png, .pdf or .svg, got {plot}")
    if plot is not None:
        prepare_folder(plot.parent, PICTURE_BYTES)
    if threads is not None:
        torch.set_num_threads(threads)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)

    notes: list[str] = []
    with torch.inference_mode(not training):
        limits, results = measure(suite, shape, numbers, kind, chosen, times, notes.append)
    name_of_device = machine.device_name(chosen)
    if json_output:
        report = {
            "benchmark": f"bench {suite.value}",
            "settings": {"model": name, "tokens": numbers, "dtype": harness.dtype_name(kind), "repeats": times},
            "limits": {"bytes_per_s": limits.bandwidth, "operations_per_s": limits.rate},
            "environment": machine.environment(),
            "results": [result.as_json() for result in results],
        }
        print(json.dumps(report, indent=2))
    else:
        show(results, limits, name_of_device, kind, list(dict.fromkeys(notes)))
    if plot is not None:
        draw(plot, results, limits, name_of_device)
        (Console(stderr=True) if json_output else console).print(f"Saved [bold]{escape(str(plot))}[/]")
    if wrong_outputs(results):
        sys.exit(1)


def measure(
    suite: Suite,
    shape: layer.Shape,
    numbers: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    say: Callable[[str], object],
) -> tuple[rates.Limits, list[harness.CaseResult]]:
    """The device's limits and a result per number of tokens. Raises ValueError if the memory is too small."""
    is_layer = suite in (Suite.layer, Suite.training)
    copies = 1
    if is_layer:
        if device.type == "cpu":
            copies = min(harness.rotation_length(shape.weight_bytes(dtype), 3), 7)
        copies = check_memory(shape, dtype, device, copies, training=suite is Suite.training)
    results: list[harness.CaseResult] = []
    with progress(f"bench {suite.value}") as bar:
        task = bar.add_task("the machine's limits", total=len(numbers) + 1 + is_layer)
        limits = rates.measure_limits(device, dtype)
        bar.advance(task)
        weights = []
        if is_layer:
            bar.update(task, description="making weights")
            weights = [
                layer.make_weights(shape, dtype, device, seed, unused=layer.transformers_has(shape.routing))
                for seed in range(copies)
            ]
            bar.advance(task)
        peers = routing.installed_peers(shape.routing, device, say) if suite is Suite.routing else {}
        common: dict[str, Any] = {"device": device, "dtype": dtype, "repeats": repeats}

        def run_case(number: int) -> harness.CaseResult:
            if suite is Suite.routing:
                return routing.run_case(shape.routing, number, bandwidth=limits.bandwidth, others=peers, **common)
            if suite is Suite.epilogue:
                sizes = (shape.routing, shape.hidden_size, number)
                return epilogue.run_case(*sizes, bandwidth=limits.bandwidth, **common)
            training = suite is Suite.training
            return layer.run_case(shape, number, weights, limits=limits, repeats=repeats, training=training, say=say)

        for number in numbers:
            bar.update(task, description=harness.counted(number, "token"))
            result = run_case(number)
            for _ in range(MOST_REPETITIONS):
                if not result.floor_is_beaten:
                    break
                limits = limits.best(rates.measure_limits(device, dtype))  # the machine can do more than was measured
                result = run_case(number)
            results.append(result)
            bar.advance(task)
    return limits, results


def show(
    results: Sequence[harness.CaseResult],
    limits: rates.Limits,
    device_name: str,
    dtype: torch.dtype,
    notes: Sequence[str],
) -> None:
    """A table per case."""
    console.print(
        f"{escape(device_name)}: memory at {limits.bandwidth / 1e9:,.0f} GB/s, {harness.dtype_name(dtype)} products at "
        f"{limits.rate / 1e12:,.2f} TFLOP/s, measured now",
        highlight=False,
    )
    for result in results:
        table = Table()
        table.add_column("", no_wrap=True)
        for column in ("median", "quartiles", "of floor", f"x {result.subject}", "right"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, timing in result.timings.items():
            check = result.checks.get(name)
            verdict = "not checked" if check is None else ("[green]yes[/]" if check.passed else "[bold red]NO[/]")
            table.add_row(
                name,
                harness.format_seconds(timing.median),
                harness.format_quartiles(timing),
                f"{100 * result.floor / timing.median:.0f}%",
                "" if name == result.subject else f"{result.speedup(name):.2f}x",
                verdict,
            )
        print_table(console, f"{result.case}; floor {harness.format_seconds(result.floor)}", table)
        if result.other_load > harness.MOST_OTHER_LOAD:
            share = f"{100 * result.other_load:.0f}%"
            console.print(f"Others used {share} of the processors: measure again on a quiet machine.")
    for note in notes:
        console.print(f"{escape(note)}.", highlight=False)
    for line in wrong_outputs(results):
        console.print(f"[bold red]Wrong output:[/] {escape(line)}")


def wrong_outputs(results: Sequence[harness.CaseResult]) -> list[str]:
    return [f"{result.case}: {name}" for result in results for name, one in result.checks.items() if not one.passed]


def draw(path: Path, results: Sequence[harness.CaseResult], limits: rates.Limits, device_name: str) -> None:
    from zexpert_tools.benchmark import plots

    layers = [result for result in results if isinstance(result, layer.LayerResult)]
    if layers:
        plots.save_roofline(path, layers, limits, device_name=device_name)
    else:
        plots.save_bars(path, results, limits, device_name=device_name)


def parse_dtype(name: str | None, suite: Suite, device: torch.device) -> torch.dtype:
    if name is None:
        name = "bfloat16" if device.type == "cuda" and suite is not Suite.routing else "float32"
    if name not in harness.DTYPES:
        raise fail(f"--dtype must be one of {', '.join(harness.DTYPES)}, got {name}")
    return harness.DTYPES[name]


def check_memory(shape: layer.Shape, dtype: torch.dtype, device: torch.device, copies: int, *, training: bool) -> int:
    """The copies of the layer, at most `copies`, that fit the device's free memory; ValueError if not one does."""
    unused = shape.routing.num_experts / shape.routing.num_real_experts if layer.transformers_has(shape.routing) else 1
    needed = int(shape.weight_bytes(dtype) * (unused + (3 if training else 0)))  # a gradient per contender
    free = free_memory(device)
    if needed > 0.8 * free:
        raise ValueError(
            f"--model must fit the memory: this layer needs {needed / 2**30:.1f} GiB in {harness.dtype_name(dtype)}, "
            f"{free / 2**30:.1f} GiB are free; smaller is --model small"
        )
    return max(1, min(copies, int(0.8 * free / needed)))


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    status = Path("/proc/meminfo")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    pages: Any = os.sysconf("SC_PHYS_PAGES")
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
