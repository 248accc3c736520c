"""Commands: `zexpert demo`, `zexpert generate` and `zexpert plan`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from zexpert.cli.text import load_text

app = typer.Typer(
    help="Mixture-of-experts layers with zero experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()


DEFAULT_OUT = Path("zexpert-demo")


@app.callback()
def main() -> None:
    """Mixture-of-experts layers with zero experts."""


def fail(message: str) -> typer.Exit:
    """Prints a user's mistake in one sentence; raise the result."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def choose_device(name: str) -> torch.device:
    """The device called `name`; for "auto" the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise fail(f'--device must be "auto" or a device such as "cpu" or "cuda:0", got "{name}"') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise fail(f"--device {name} needs a GPU that PyTorch can use, and there is none")
    return device


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(help="File to train on; without it, the documentation strings of Python's library.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 450,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the batches and the sampled text.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the checkpoint.")] = DEFAULT_OUT,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint of an earlier demo to go on from.")] = None,
    device: Annotated[str, typer.Option(help='"auto" takes the GPU where there is one.')] = "auto",
    generate_bytes: Annotated[int, typer.Option(min=0, help="Bytes of text to generate.")] = 300,
) -> None:
    """Train a small byte-level LongCat-style model, then show where it spends its compute."""
    from zexpert.cli.demo import run_demo

    chosen = choose_device(device)
    given = {"--text": text, "--out": None if out == DEFAULT_OUT else out}
    try:
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
    except (ValueError, OSError) as error:
        raise fail(str(error)) from error


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint that the demo saved.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "Return the ",
    length: Annotated[int, typer.Option(min=1, help="Bytes to generate.")] = 300,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest byte every time.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampled text.")] = 0,
    device: Annotated[str, typer.Option(help='"auto" takes the GPU where there is one.')] = "auto",
) -> None:
    """Generate text with a model that the demo trained, coloured by the compute each byte used."""
    from zexpert.cli.demo import show_generated
    from zexpert.training.trainer import load_model

    chosen = choose_device(device)
    if not prompt:
        raise fail("--prompt must hold at least one byte")
    try:
        model = load_model(checkpoint, chosen)
    except ValueError as error:
        raise fail(str(error)) from error
    show_generated(console, model, prompt.encode(), length, temperature=temperature, seed=seed)


@app.command()
def plan(
    gpus: Annotated[
        list[int] | None,
        typer.Option(min=1, help="GPUs that share the experts; may be repeated. 8 to 1024 without it."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens on each GPU.")] = 4096,
    ffn_experts: Annotated[float, typer.Option(min=0.0, max=12.0, help="Mean slots of a token that do work.")] = 8.0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that NVLink connects.")] = 8,
    nvlink: Annotated[float, typer.Option(min=0.001, help="GB/s from a GPU to others of its node.")] = 450.0,
    network: Annotated[float, typer.Option(min=0.001, help="GB/s from a GPU to other nodes.")] = 50.0,
    latency: Annotated[float, typer.Option(min=0.0, help="Microseconds of an exchange of nothing.")] = 20.0,
    memory: Annotated[float, typer.Option(min=0.001, help="TB/s of a GPU's memory.")] = 4.0,
    matmul: Annotated[float, typer.Option(min=0.001, help="TFLOP/s of the experts' products.")] = 650.0,
) -> None:
    """Estimate bytes, times and memory of LongCat-Flash's experts spread over a cluster."""
    from zexpert.cli.plan import DEFAULT_GPUS, show_plan
    from zexpert.distributed_plan import Cluster, MoEShape

    cluster = Cluster(gpus_per_node, nvlink * 1e9, network * 1e9, latency * 1e-6, memory * 1e12, matmul * 1e12)
    try:
        show_plan(console, gpus or DEFAULT_GPUS, tokens, MoEShape(ffn_experts=ffn_experts), cluster)
    except ValueError as error:
        raise fail(str(error)) from error


if __name__ == "__main__":
    app()
