# SPDX-License-Identifier: Apache-2.0
"""The `zexpert` command: its subcommands, one line each."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from zexpert._version import __version__
from zexpert_tools.cli.bench import bench
from zexpert_tools.cli.doctor import doctor
from zexpert_tools.cli.info import info
from zexpert_tools.cli.plan import plan
from zexpert_tools.cli.profile import profile
from zexpert_tools.cli.terminal import DeviceOption, SeedOption, TextOption, choose_device, command, console, fail
from zexpert_tools.text import load_text

app = typer.Typer(
    help="Mixture-of-experts layers with zero experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

DEFAULT_OUT = Path("zexpert-demo")


def show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"zexpert {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Mixture-of-experts layers with zero experts."""


def demo(
    text: TextOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 450,
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the pictures and the checkpoint.")
    ] = DEFAULT_OUT,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint of an earlier demo to continue.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in --out.")] = False,
    device: DeviceOption = "auto",
    generate_bytes: Annotated[int, typer.Option(min=0, help="Bytes of text to generate.")] = 300,
) -> None:
    """Train a small byte-level LongCat-style model, then show where it spends its compute.

    Ctrl-C and SIGTERM save the checkpoint; --resume continues it.
    """
    from zexpert_tools.cli.demo import DemoOptions, run_demo

    options = DemoOptions(
        steps=steps,
        seed=seed,
        out=out,
        resume=resume,
        overwrite=overwrite,
        device=choose_device(device),
        generate_bytes=generate_bytes,
        resume_options="".join(
            f" {name} {shlex.quote(str(path))}"
            for name, path in (("--text", text), ("--out", None if out == DEFAULT_OUT else out))
            if path is not None
        ),
    )
    run_demo(console, load_text(text, min_bytes=4096), options)


def generate(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint that the demo saved.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "Return the ",
    length: Annotated[int, typer.Option(min=1, help="Bytes to generate.")] = 300,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest byte every time.")] = 0.7,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Generate text with a model that the demo trained, coloured by the compute each byte used."""
    from zexpert_tools.checkpoint import load_model
    from zexpert_tools.cli.demo import show_generated

    if not prompt:
        raise fail("--prompt must hold at least one byte")
    model = load_model(checkpoint, choose_device(device))
    # os.fsencode gives the bytes that were typed, UTF-8 or not.
    show_generated(console, model, os.fsencode(prompt), length, temperature=temperature, seed=seed)


for run in (demo, generate, info, doctor, bench, profile, plan):
    app.command()(command(run))


if __name__ == "__main__":
    app()
