# SPDX-License-Identifier: Apache-2.0
"""The demo's story: train, measure, generate, show where the compute goes, time the layer."""

from __future__ import annotations

import shlex
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zexpert import FusedMoE, RoutingResult
from zexpert_tools.benchmark import plain_moe
from zexpert_tools.byte_decoder import ByteDecoder, ByteDecoderConfig
from zexpert_tools.checkpoint import load_trainer, save_checkpoint
from zexpert_tools.cli.terminal import has_colours, print_panel, print_table, progress
from zexpert_tools.files import prepare_folder
from zexpert_tools.pictures import coloured_text, save_compute_map, save_training_curves
from zexpert_tools.text import printable_bytes
from zexpert_tools.trainer import StepRecord, Trainer, TrainerConfig

#: Space for the demo's two pictures.
PICTURE_BYTES = 4 << 20


@dataclass(frozen=True)
class DemoOptions:
    """The options of the command."""

    steps: int
    seed: int
    out: Path
    resume: Path | None
    overwrite: bool
    device: torch.device
    generate_bytes: int
    resume_options: str
    """Options of the command that continues an interrupted demo."""

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"


def run_demo(console: Console, text: Tensor, options: DemoOptions) -> None:
    """Trains on `text` (uint8 [n]) and shows the result; files go to the folder `options.out`.

    Ctrl-C and SIGTERM end the training after a whole step: the checkpoint is saved, and the command that continues is
    printed.

    Raises:
        ValueError: a checkpoint cannot be resumed, or must not be replaced; the folder cannot be written.
        OSError: writing a file failed.
    """
    torch.manual_seed(options.seed)
    trainer = make_trainer(text, options)
    prepare_folder(options.out, checkpoint_bytes(trainer.model) + PICTURE_BYTES)
    introduce(console, trainer)
    with stop_requests() as stopped:  # saving included: a second Ctrl-C must not lose it
        train(console, trainer, stopped)
        save_checkpoint(trainer, options.checkpoint)
    if trainer.step < options.steps:
        say(console, f"Interrupted at step {trainer.step} of {options.steps}. Saved {options.checkpoint}; go on with")
        resume = f"--resume {shlex.quote(str(options.checkpoint))} --steps {options.steps}"
        say(console, f"  zexpert demo {resume}{options.resume_options}")
        return
    show_results(console, trainer)
    show_compute(console, trainer, options.out)
    if options.generate_bytes:
        prompt = bytes(trainer.held_out_text[:64].tolist())
        length = options.generate_bytes
        show_generated(console, trainer.model, prompt, length, temperature=0.7, seed=options.seed)
    time_layer(console, trainer)
    say(
        console,
        f"Saved {options.out / 'compute_map.png'}, {options.out / 'training.png'} and the checkpoint. More text:",
    )
    say(console, f"  zexpert generate --checkpoint {shlex.quote(str(options.checkpoint))} --prompt 'Return the '")


def say(console: Console, line: str) -> None:
    """Prints a line as it is: a path may look like rich's markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def make_trainer(text: Tensor, options: DemoOptions) -> Trainer:
    """A new trainer, or the one of the checkpoint to resume. Raises ValueError if its checkpoint would replace another
    that the user did not name."""
    config = TrainerConfig(steps=options.steps, seed=options.seed)
    resumed = options.resume is not None and options.checkpoint.exists() and options.checkpoint.samefile(options.resume)
    if options.checkpoint.exists() and not resumed and not options.overwrite:
        raise ValueError(
            f"{options.checkpoint} is there already: --resume {options.checkpoint} continues it, --overwrite replaces "
            "it, --out names another folder"
        )
    if options.resume is None:
        return Trainer(ByteDecoder(ByteDecoderConfig()).to(options.device), text, config)
    trainer = load_trainer(options.resume, text, config, options.device)
    if trainer.step >= options.steps:
        done = f"{trainer.step} steps that {options.resume} has done"
        raise ValueError(f"--steps must be above the {done}, got {options.steps}")
    return trainer


def checkpoint_bytes(model: ByteDecoder) -> int:
    """About the size of its checkpoint: weights and AdamW's two moments in float32."""
    return 3 * 4 * sum(parameter.numel() for parameter in model.parameters())


def introduce(console: Console, trainer: Trainer) -> None:
    model, config = trainer.model, trainer.model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print_panel(
        console,
        "zexpert demo",
        f"A byte-level decoder, {parameters / 1e6:.1f} M parameters, {config.num_layers} layers, on {trainer.device}.\n"
        f"In every layer each byte picks {config.top_k} experts, of {config.num_experts} with a feed-forward "
        f"network and {config.zero_expert_num} without, the zero experts.\n"
        "A zero expert returns its input and costs nothing. A controller moves the mean towards "
        f"{trainer.controller.target_ffn_experts:g} feed-forward experts per byte. Which bytes get more, and which "
        "fewer, the model learns.\n"
        f"Training: {trainer.config.steps - trainer.step} steps; 450 need about two minutes on two cores.",
    )


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set in the block, instead of ending the process."""
    stopped = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in signals}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(console: Console, trainer: Trainer, stopped: threading.Event) -> None:
    """Trains to the configured number of steps, or to the step in which `stopped` is set."""

    def describe(record: StepRecord) -> str:
        return f"{record.bits_per_byte:.2f} bits/byte, {record.ffn_slots_per_token:.2f} experts/byte"

    first, started = trainer.step, time.perf_counter()
    with progress("training") as bar:
        task = bar.add_task("", total=trainer.config.steps, completed=trainer.step)
        while trainer.step < trainer.config.steps and not stopped.is_set():
            record = trainer.train_step()
            bar.update(task, completed=trainer.step, description=describe(record))
            if not console.is_terminal and trainer.step % 25 == 0:
                left = (time.perf_counter() - started) / (trainer.step - first) * (trainer.config.steps - trainer.step)
                console.print(f"step {trainer.step}: {describe(record)}, {left:.0f} s left", highlight=False)


def show_results(console: Console, trainer: Trainer) -> None:
    """A table: loss, and the compute per byte against its target."""
    recent = trainer.history[-20:]
    target = trainer.controller.target_ffn_experts
    top_k = trainer.model.config.top_k
    held_out = trainer.held_out_bits_per_byte()
    measured = count_ffn_slots(trainer.model, trainer.held_out_windows()[:, :-1]).double().mean().item()
    table = Table(show_header=False)
    table.add_row(
        f"training text, mean of the last {len(recent)} steps",
        f"{statistics.fmean(record.bits_per_byte for record in recent):.3f} bits per byte",
    )
    table.add_row("held-out text", f"{held_out:.3f} bits per byte (8 is knowing nothing)")
    table.add_row(
        "feed-forward experts per byte and layer, held-out text",
        f"{measured:.2f} of {top_k} (target {target:.2f}, off by {abs(measured / target - 1):.1%})",
    )
    table.add_row("choices that fell on zero experts, at no cost", f"{1 - measured / top_k:.0%}")
    print_table(console, f"After {trainer.step} steps", table)


@torch.no_grad()
def count_ffn_slots(model: ByteDecoder, windows: Tensor) -> Tensor:
    """Feed-forward experts used, int64 [layers, B, T], for every byte of `windows` (int64 [B, T])."""
    counts: list[Tensor] = []

    def capture(routing: RoutingResult) -> None:
        counts.append((routing.topk_ids >= 0).sum(dim=1).view(windows.shape))

    routers = [layer.router for layer in model.moe_layers()]
    for router in routers:
        router.set_capture_fn(capture)
    try:
        model.eval()(windows)
    finally:
        for router in routers:
            router.set_capture_fn(None)
    return torch.stack(counts).cpu()


def show_compute(console: Console, trainer: Trainer, out: Path) -> None:
    """The start of the held-out text coloured by compute, and the pictures."""
    model = trainer.model
    top_k, target = model.config.top_k, trainer.controller.target_ffn_experts
    windows = trainer.held_out_windows()[:, :-1]
    slots = count_ffn_slots(model, windows)
    passage, passage_slots = windows[0].cpu().to(torch.uint8), slots[:, 0]
    colours = has_colours(console)
    title = "Held-out text" + (", brighter where it used more compute" if colours else "")
    text = coloured_text(printable_bytes(passage.tolist()), passage_slots, top_k, colours=colours)
    print_panel(console, title, text)
    save_compute_map(
        out / "compute_map.png",
        passage,
        passage_slots,
        top_k=top_k,
        all_ffn_slots=slots.flatten(1),
        target=target,
    )
    save_training_curves(out / "training.png", trainer.history, top_k=top_k, target=target)


def show_generated(
    console: Console, model: ByteDecoder, prompt: bytes, length: int, *, temperature: float, seed: int
) -> None:
    """Generates `length` bytes after `prompt` and prints all of it, coloured by the compute each byte used."""
    device = model.embedding.weight.device
    start = torch.frombuffer(bytearray(prompt), dtype=torch.uint8).to(device)
    generator = torch.Generator().manual_seed(seed)
    generated = model.eval().generate(start, length, temperature=temperature, generator=generator)
    # The model reads at most one window at a time; a byte's compute is that of its place in its window.
    windows = generated.split(model.config.context_length)
    slots = torch.cat([count_ffn_slots(model, window[None].long())[:, 0] for window in windows], dim=1)
    text = coloured_text(printable_bytes(generated.tolist()), slots, model.config.top_k, colours=has_colours(console))
    print_panel(console, f"Generated after a prompt of {len(prompt)} bytes", text)


@torch.no_grad()
def time_layer(console: Console, trainer: Trainer, repeats: int = 20) -> None:
    """Times the first trained layer against plain PyTorch on the tokens it meets, side by side."""
    model = trainer.model.eval()
    layer = model.layers[0]
    captured: list[tuple[Tensor, ...]] = []
    handle = layer.moe.register_forward_pre_hook(lambda module, inputs: captured.append(inputs))  # type: ignore[union-attr]
    model(trainer.held_out_windows(8)[:, :-1])
    handle.remove()
    hidden_states, router_logits = (tensor.flatten(0, 1) for tensor in captured[0])
    moe: FusedMoE = layer.moe  # type: ignore[assignment]

    contenders: dict[str, Callable[[], Tensor]] = {
        "zexpert": lambda: moe(hidden_states, router_logits),
        "plain PyTorch": lambda: plain_moe.moe(
            hidden_states,
            router_logits,
            moe.e_score_correction_bias,
            moe.w13_weight,
            moe.w2_weight,
            model.config.top_k,
            model.config.routed_scaling_factor,
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    difference = (contenders["zexpert"]() - contenders["plain PyTorch"]()).abs().max()
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if hidden_states.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    table = Table()
    table.add_column("")
    table.add_column("time", justify="right")
    table.add_column("speed against plain PyTorch", justify="right")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        table.add_row(name, f"{1e3 * median:.2f} ms", f"{medians['plain PyTorch'] / median:.2f}x")
    print_table(console, f"One trained layer, {hidden_states.shape[0]} tokens, median of {repeats}", table)
    console.print(f"Largest difference between the two outputs: {difference.item():.1e}.")
