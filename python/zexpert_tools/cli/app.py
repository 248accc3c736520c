# SPDX-License-Identifier: Apache-2.0
"""The `zexpert` command: its subcommands, one line each."""

from __future__ import annotations

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
from zexpert_tools.cli.terminal import MAX_SEED, choose_device, console, fail, users_mistakes
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


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(help="File to train on; without it, the documentation strings of Python's library.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 450,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the weights, the batches and the sampled text.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the pictures and the checkpoint.")
    ] = DEFAULT_OUT,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint of an earlier demo to go on from.")] = None,
    device: Annotated[str, typer.Option(help='"auto" takes the GPU where there is one.')] = "auto",
    generate_bytes: Annotated[int, typer.Option(min=0, help="Bytes of text to generate.")] = 300,
) -> None:
    """Train a small byte-level LongCat-style model, then show where it spends its compute."""
    from zexpert_tools.cli.demo import run_demo

    chosen = choose_device(device)
    given = {"--text": text, "--out": None if out == DEFAULT_OUT else out}
    with users_mistakes():
        run_demo(
            console,
            text=load_text(text, min_bytes=4096),
            steps=steps,
            seed=seed,
            out=out,
            resume=resume,
            device=chosen,
            generate_bytes=generate_bytes,
            resume_options="".join(f" {name} {shlex.quote(str(path))}" for name, path in given.items() if path),
        )


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint that the demo saved.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "Return the ",
    length: Annotated[int, typer.Option(min=1, help="Bytes to generate.")] = 300,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest byte every time.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampled text.")] = 0,
    device: Annotated[str, typer.Option(help='"auto" takes the GPU where there is one.')] = "auto",
) -> None:
    """Generate text with a model that the demo trained, coloured by the compute each byte used."""
    from zexpert_tools.cli.demo import show_generated
    from zexpert_tools.trainer import load_model

    chosen = choose_device(device)
    if not prompt:
        raise fail("--prompt must hold at least one byte")
    with users_mistakes():
        model = load_model(checkpoint, chosen)
    show_generated(console, model, prompt.encode(), length, temperature=temperature, seed=seed)


app.command()(info)
app.command()(doctor)
app.command()(bench)
app.command()(profile)
app.command()(plan)


if __name__ == "__main__":
    app()
