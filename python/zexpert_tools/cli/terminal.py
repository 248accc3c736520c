# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the terminal, a user's mistakes, devices."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zexpert_tools.benchmark import harness

#: In a pipe, lines are as long as what they say.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000)

#: Columns of framed text at most, wherever it is shown.
PANEL_WIDTH = 100

#: Largest seed that torch's generators take as a signed number.
MAX_SEED = 2**63 - 1


def fail(message: str) -> typer.Exit:
    """Prints a user's mistake in one sentence; raise the result."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def parse_positive_ints(option: str, text: str) -> list[int]:
    try:
        return harness.positive_ints(text)
    except argparse.ArgumentTypeError:
        raise fail(f'{option} must be positive integers with commas between, such as 1,16,256, got "{text}"') from None


def print_table(console: Console, title: str, table: Table) -> None:
    """The table under its title, a line of its own: a title of rich's is padded, and wrapped, to the table's width."""
    console.print(title, style="table.title", highlight=False, markup=False)
    console.print(table)


def print_panel(console: Console, title: str, text: Text | str) -> None:
    """The text in a frame."""
    console.print(Panel(text, title=title, width=min(PANEL_WIDTH, console.width)))


def has_colours(console: Console) -> bool:
    """Whether what is printed is shown in colours: not in a pipe, and not where NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


@contextmanager
def users_mistakes() -> Iterator[None]:
    """Turns a ValueError or OSError of the block, whose message is one sentence, into `fail`, and running out of memory
    too."""
    try:
        yield
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        raise fail(told) from error
    except ValueError as error:
        raise fail(str(error)) from error
    except RuntimeError as error:
        texts = ("can't allocate memory", "could not allocate")  # by PyTorch, by zexpert's operators
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in texts):
            raise
        raise fail("the memory does not suffice: fewer tokens or a smaller model may fit") from error


def choose_device(name: str) -> torch.device:
    """The device called `name`, on the CPU or a GPU; for "auto" the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise fail(f'--device must be "auto" or a device such as "cpu" or "cuda:0", got "{name}"')
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise fail(f"--device {name} needs a GPU that PyTorch can use, and there is none")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise fail(f"--device must name one of the {torch.cuda.device_count()} GPUs, got {name}")
    return device


def progress(title: str) -> Progress:
    """A bar for long work; each task's description says what goes on. Goes to standard error, so that what a command
    prints can be piped."""
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
