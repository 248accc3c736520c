# SPDX-License-Identifier: Apache-2.0
"""`zexpert profile`: the feed-forward compute of a trained model by token and layer, and its experts' load."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from zexpert import RoutingResult
from zexpert.telemetry import RoutingStats, moe_runners, track_routing
from zexpert_tools.checkpoint import load_model
from zexpert_tools.cli.terminal import (
    DeviceOption,
    TextOption,
    choose_device,
    console,
    first_line,
    has_colours,
    print_panel,
    print_table,
    progress,
)
from zexpert_tools.files import prepare_folder
from zexpert_tools.text import load_text, printable_bytes

SHOWN_CHARACTERS = 480
DEFAULT_OUT = Path("zexpert-profile")
PICTURE_BYTES = 4 << 20  # space for the two pictures
ACCEPTED = "profile accepts checkpoints of zexpert demo and folders with a LongCat-Flash of transformers"


@dataclass(frozen=True)
class Subject:
    """A model and its text."""

    kind: str
    model: nn.Module
    tokens: Tensor  # [T], int64
    pieces: Sequence[str]  # T
    window: int  # tokens read at a time


@dataclass(frozen=True)
class Profile:
    """The model's routing of the text."""

    stats: dict[str, RoutingStats]  # by layer
    ffn_slots: Tensor  # [layers, T], int64: feed-forward experts that each token used
    top_k: int


def profile(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint of `zexpert demo`, or a folder with a LongCat-Flash of transformers.")
    ],
    text: TextOption = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the pictures.")] = DEFAULT_OUT,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the text to read.")] = 8192,
    window: Annotated[int, typer.Option(min=1, help="Tokens read at a time, at most the model's context.")] = 256,
    device: DeviceOption = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show the feed-forward experts per token and the load of the experts, layer by layer, on a text."""
    subject = load_subject(model, text, max_tokens, window, choose_device(device))
    prepare_folder(out, PICTURE_BYTES)
    measured = run(subject)
    if json_output:
        print(json.dumps(as_json(model, subject, measured), indent=2))
    else:
        show(subject, measured)
    from zexpert_tools import pictures

    pictures.save_profile(out / "profile.png", measured.stats, top_k=measured.top_k)
    pictures.save_token_map(out / "tokens.png", subject.pieces, measured.ffn_slots, top_k=measured.top_k)
    if not json_output:
        console.print(
            f"Saved [bold]{escape(str(out / 'profile.png'))}[/] and [bold]{escape(str(out / 'tokens.png'))}[/]."
        )


def load_subject(path: Path, text: Path | None, max_tokens: int, window: int, device: torch.device) -> Subject:
    """The model at `path`. Raises ValueError, in one sentence, for anything else."""
    if (path / "config.json").is_file():
        return load_transformers(path, text, max_tokens, window, device)
    if path.is_dir():
        raise ValueError(f"{path} must have a config.json; {ACCEPTED}")
    try:
        model = load_model(path, device)
    except ValueError as error:
        raise ValueError(f"{error}; {ACCEPTED}") from error
    data = load_text(text, min_bytes=1)[:max_tokens]
    pieces = printable_bytes(data.tolist())
    return Subject("byte decoder", model, data.long().to(device), pieces, min(window, model.config.context_length))


def load_transformers(path: Path, text: Path | None, max_tokens: int, window: int, device: torch.device) -> Subject:
    """A LongCat-Flash that transformers saved, on zexpert's kernels."""
    try:
        kind = json.loads((path / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path / 'config.json'} must be a model's configuration, got something else") from error
    if kind != "longcat_flash":
        raise ValueError(f'{path} must hold a model of model_type "longcat_flash", got {kind!r}; {ACCEPTED}')
    try:
        import transformers

        from zexpert.integrations.transformers import patch
    except ImportError as error:
        raise ValueError(f"{path} is a model of transformers, which cannot be imported: {error}") from error
    given: Any = transformers
    try:
        given.AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{path / 'config.json'} must be a model's configuration: {first_line(error)}") from error
    try:
        tokenizer = given.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # which one depends on the model's family
        raise ValueError(f"{path} must hold a tokenizer, too: {first_line(error)}") from error
    try:
        model = given.AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    except Exception as error:
        raise ValueError(f"{path} holds no model that transformers can load: {first_line(error)}") from error
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} in {path} must be finite")
    patch(model.eval().to(device))
    words = bytes(load_text(text, min_bytes=1).tolist()).decode("utf-8", errors="replace")
    ids = tokenizer(words[: 16 * max_tokens], add_special_tokens=False)["input_ids"][:max_tokens]
    if not ids:
        raise ValueError(f"the text must hold at least one token of {path}'s tokenizer, got none")
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(ids) >= vocabulary:
        raise ValueError(f"{path}'s tokenizer must give tokens below the model's {vocabulary}, got {max(ids)}")
    pieces = [tokenizer.decode([token]) for token in ids]
    return Subject(type(model).__name__, model, torch.tensor(ids, device=device), pieces, window)


@torch.no_grad()
def run(subject: Subject) -> Profile:
    """Runs the model over the text, window by window."""
    stats = track_routing(subject.model)
    for one in stats.values():
        one.reset()
    runners = moe_runners(subject.model)
    counts: dict[str, list[Tensor]] = {name: [] for name in runners}

    def capture(name: str) -> Callable[[RoutingResult], None]:
        return lambda routing: counts[name].append((routing.topk_ids >= 0).sum(dim=1).cpu())

    for name, runner in runners.items():
        runner.router.set_capture_fn(capture(name))  # type: ignore[operator]
    windows = subject.tokens.split(subject.window)
    with progress("profile") as bar:
        task = bar.add_task("windows", total=len(windows))
        for tokens in windows:
            subject.model(tokens[None])
            bar.advance(task)
    slots = torch.stack([torch.cat(parts) for parts in counts.values()])
    return Profile(stats, slots, next(iter(stats.values())).top_k)


def show(subject: Subject, measured: Profile) -> None:
    """The start of the text coloured by compute, then a line per layer."""
    from zexpert_tools.pictures import coloured_text

    colours = has_colours(console)
    lengths = itertools.accumulate(map(len, subject.pieces))
    shown = max(1, sum(length <= SHOWN_CHARACTERS for length in lengths))
    text = coloured_text(subject.pieces[:shown], measured.ffn_slots[:, :shown], measured.top_k, colours=colours)
    title = "The text" + (", brighter where it used more compute" if colours else "")
    print_panel(console, title, text)

    table = Table()
    table.add_column("layer", overflow="fold")
    for column in ("FFN experts\nper token", "zero\nslots", "busiest\n/ mean", "evenness\n(1: even)", "idle\nexperts"):
        table.add_column(column, justify="right")
    for name, stats in measured.stats.items():
        table.add_row(name, *row(stats))
    slots = measured.ffn_slots.double()
    table.add_section()
    table.add_row("all", f"{slots.mean():.2f}", f"{1 - slots.mean() / measured.top_k:.0%}", "", "", "")
    print_table(console, f"{subject.kind}, {len(subject.pieces):,} tokens", table)


def row(stats: RoutingStats) -> tuple[str, ...]:
    return (
        f"{float(stats.mean_ffn_slots):.2f} of {stats.top_k}",
        f"{float(stats.zero_rate):.0%}",
        f"{float(stats.load_imbalance):.2f}",
        f"{float(stats.normalized_load_entropy):.3f}",
        f"{int((stats.expert_load == 0).sum())} of {stats.num_experts}",
    )


def as_json(path: Path, subject: Subject, measured: Profile) -> dict[str, Any]:
    return {
        "model": str(path),
        "kind": subject.kind,
        "num_tokens": len(subject.pieces),
        "top_k": measured.top_k,
        "mean_ffn_slots": float(measured.ffn_slots.double().mean()),
        "layers": {name: stats.as_dict() for name, stats in measured.stats.items()},
    }
