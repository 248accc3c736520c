# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the terminal, errors in one sentence, devices."""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zexpert_tools.benchmark import parse

#: In a pipe, lines are as long as their text.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000)

#: Columns of framed text at most, wherever it is shown.
PANEL_WIDTH = 100

#: Largest number that torch accepts as a size or as a seed.
MAX_INTEGER = 2**63 - 1

DeviceOption = Annotated[str, typer.Option(help='"auto": the GPU if there is one, else the CPU.')]
SeedOption = Annotated[
    int, typer.Option(min=0, max=MAX_INTEGER, help="Seed of everything that is drawn: weights, batches, text.")
]
TextOption = Annotated[
    Path | None, typer.Option(help="A file. Without it: the documentation strings of Python's library.")
]

#: Packages of the extra `cli`; of others, the name is the extra's.
CLI_PACKAGES = ("matplotlib", "rich", "typer")


def fail(message: str, exit_code: int = 2) -> typer.Exit:
    """Prints an error; raise the result."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(exit_code)


def command(run: Callable[..., None]) -> Callable[..., None]:
    """`run` as a command: whatever goes wrong is one sentence on standard error.

    A value that no option accepts (NaN, an integer too large for torch), a ValueError, an OSError, a package that is
    missing and too little memory end with exit code 2. Any other exception is a bug and ends with 1. With
    ZEXPERT_TRACEBACK=1 exceptions pass, so that Python prints where they come from.
    """

    @functools.wraps(run)
    def guarded(**options: Any) -> None:
        for name, value in options.items():
            check_value(name, value)
        if os.environ.get("ZEXPERT_TRACEBACK", "0") != "0":
            run(**options)
            return
        try:
            run(**options)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            message = users_mistake(error)
            if message is not None:
                raise fail(message) from error
            what = f"{type(error).__name__}: {first_line(error)}"
            raise fail(f"this is a bug in zexpert: {what} (ZEXPERT_TRACEBACK=1 prints where)", 1) from error

    return guarded


def check_value(name: str, value: object) -> None:
    """Ends the command if nothing could work with this value of the option."""
    option = "--" + name.replace("_", "-")
    if isinstance(value, float) and not math.isfinite(value):
        raise fail(f"{option} must be finite, got {value}")
    if isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise fail(f"{option} must be below 2^63, got {value}")


def users_mistake(error: Exception) -> str | None:
    """The sentence for an error that the user can mend; None for a bug."""
    if is_out_of_memory(error):
        return "out of memory: try fewer tokens or a smaller model"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else first_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"this needs {package}: pip install 'zexpert[{'cli' if package in CLI_PACKAGES else package}]'"
    return str(error) if isinstance(error, ValueError) else None


def is_out_of_memory(error: Exception) -> bool:
    # The first two texts are PyTorch's, the last is of zexpert's operators.
    texts = ("can't allocate memory", "Storage size calculation overflowed", "could not allocate")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def first_line(error: Exception) -> str:
    """The first line of the error's text, and the next one if the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(",:")


def parse_positive_ints(option: str, text: str) -> list[int]:
    try:
        numbers = parse.positive_ints(text)
    except argparse.ArgumentTypeError:
        raise fail(f'{option} must be positive integers with commas between, such as 1,16,256, got "{text}"') from None
    for number in numbers:
        check_value(option.removeprefix("--"), number)
    return numbers


def print_table(console: Console, title: str, table: Table) -> None:
    """Prints the title on a line of its own, then the table: rich pads and wraps its titles to the table's width."""
    console.print(title, style="table.title", highlight=False, markup=False)
    console.print(table)


def print_panel(console: Console, title: str, text: Text | str) -> None:
    """The text in a frame."""
    console.print(Panel(text, title=title, width=min(PANEL_WIDTH, console.width)))


def has_colours(console: Console) -> bool:
    """Whether the console shows colours: not in a pipe, and not where NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


def choose_device(name: str) -> torch.device:
    """The device called `name`, on the CPU or a GPU; for "auto" the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = torch.device("meta")
    if device.type == "cpu" and device.index in (None, 0):
        return torch.device("cpu")
    if device.type != "cuda":
        raise fail(f'--device must be "auto" or a device such as "cpu" or "cuda:0", got "{name}"')
    if not torch.cuda.is_available():
        raise fail(f"--device {name} needs a GPU that PyTorch can use, and there is none")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise fail(f"--device must name one of the {torch.cuda.device_count()} GPUs, got {name}")
    return device


def progress(title: str) -> Progress:
    """A bar for long work; each task's description says what goes on. It is printed to standard error, so that a
    command's output can be piped."""
    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
