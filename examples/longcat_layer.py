# SPDX-License-Identifier: Apache-2.0
"""A mixture-of-experts layer in LongCat-Flash's routing shape on a real text: 512 FFN and 256 identity experts, K 12.

Usage: python examples/longcat_layer.py [--text FILE] [--tokens N] [--hidden-size H] [--dtype float32] [--seed S]
[--threads N]

Each token picks 12 of 768 experts; a slot that picks an identity expert costs no feed-forward network. This checks
zexpert's output against the same layer in float64, counts the slots that did work, and times the layer against plain
PyTorch (zexpert_tools.benchmark.plain_moe). The hidden size is smaller than the model's. All weights are random with a
fixed seed: the numbers show the layer's mechanics, not a model's quality.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

NUM_REAL_EXPERTS = 512
NUM_IDENTITY_EXPERTS = 256
TOP_K = 12
ROUTED_SCALING_FACTOR = 6.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DOCUMENTED_MODULES = ["statistics", "random", "decimal", "argparse", "typing", "functools", "inspect", "logging", "ast"]
BAR_WIDTH = 40
TIMING_SECONDS = 10.0


class UserError(Exception):
    """A mistake in what the user gave: one sentence, exit code 2."""


# ---- Text to hidden states -----------------------------------------------------------------------------------------


def read_text(path: Path | None, wanted_words: int) -> tuple[str, str]:
    """(text, where it is from): the file, or documentation strings of Python's standard library."""
    if path is not None:
        try:
            text = path.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot read --text {path}: {error.strerror}") from error
        if not text.strip():
            raise UserError(f"--text {path} has no words in it")
        return text, str(path)
    parts: list[str] = []
    found = 0
    for name in DOCUMENTED_MODULES:
        module = importlib.import_module(name)
        members = [member for _, member in inspect.getmembers(module) if inspect.getmodule(member) is module]
        for documentation in filter(None, map(inspect.getdoc, [module, *members])):
            parts.append(documentation)
            found += len(split_words(documentation))
        if found >= wanted_words:
            break
    return "\n".join(parts), "documentation strings of Python's standard library"


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def embed(words: Sequence[str], hidden_size: int) -> Tensor:
    """[T, hidden_size], float32: a random vector per word, seeded by the word, plus half of the previous word's state,
    scaled to unit root mean square. So one word has different states in different places, as in a model."""
    vectors: dict[str, Tensor] = {}
    for word in words:
        if word not in vectors:
            generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            vectors[word] = torch.randn(hidden_size, generator=generator)
    states = []
    state = torch.zeros(hidden_size)
    for word in words:
        state = vectors[word] + 0.5 * state
        states.append(state)
    hidden_states = torch.stack(states)
    return hidden_states / hidden_states.square().mean(dim=1, keepdim=True).sqrt()


# ---- The layer, twice ----------------------------------------------------------------------------------------------


class RandomLayer:
    """Random parameters with a fixed seed, and the layer around them in zexpert and in plain PyTorch."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype, seed: int) -> None:
        import zexpert
        from zexpert_tools.benchmark import plain_moe

        self.plain_moe = plain_moe.moe
        generator = torch.Generator().manual_seed(seed)
        num_experts = NUM_REAL_EXPERTS + NUM_IDENTITY_EXPERTS

        def normal(*sizes: int, std: float) -> Tensor:
            return (torch.randn(*sizes, generator=generator) * std).to(dtype)

        self.classifier = torch.randn(num_experts, hidden_size, generator=generator) * hidden_size**-0.5
        self.bias = torch.randn(num_experts, generator=generator) * 1e-3
        self.w13_weight = normal(NUM_REAL_EXPERTS, 2 * intermediate_size, hidden_size, std=hidden_size**-0.5)
        self.w2_weight = normal(NUM_REAL_EXPERTS, hidden_size, intermediate_size, std=intermediate_size**-0.5)
        self.zexpert_layer = zexpert.FusedMoE(
            num_experts=NUM_REAL_EXPERTS,
            top_k=TOP_K,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            zero_expert_type="identity",
            zero_expert_num=NUM_IDENTITY_EXPERTS,
            e_score_correction_bias=self.bias,
            scoring_func="softmax",
            routed_scaling_factor=ROUTED_SCALING_FACTOR,
            params_dtype=dtype,
        )
        self.zexpert_layer.w13_weight = nn.Parameter(self.w13_weight, requires_grad=False)
        self.zexpert_layer.w2_weight = nn.Parameter(self.w2_weight, requires_grad=False)

    def router_logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.float() @ self.classifier.T

    def plain(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        return self.plain_moe(
            hidden_states,
            router_logits,
            self.bias.to(router_logits.dtype),
            self.w13_weight,
            self.w2_weight,
            TOP_K,
            ROUTED_SCALING_FACTOR,
        )

    def clear_choices(self, router_logits: Tensor) -> Tensor:
        """Tokens [T] with 12th and 13th keys so far apart that float32 and float64 choose alike."""
        keys = router_logits.double().softmax(dim=-1) + self.bias.double()
        largest = keys.topk(TOP_K + 1, dim=-1).values
        return largest[:, TOP_K - 1] - largest[:, TOP_K] > 1e-5 * largest[:, TOP_K - 1].abs()


def median_seconds(contenders: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each contender; they run in turns, after one untimed call each, for TIMING_SECONDS at most."""
    stop = time.perf_counter() + TIMING_SECONDS
    times: list[list[float]] = [[] for _ in contenders]
    for repetition in range(repeats + 1):
        if repetition > 1 and time.perf_counter() > stop:
            break
        for contender, seconds in zip(contenders, times, strict=True):
            start = time.perf_counter()
            contender()
            if repetition > 0:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


# ---- The report ----------------------------------------------------------------------------------------------------


def histogram(values: Tensor, top_k: int) -> list[str]:
    """A bar per number of zero slots that occurs."""
    counts = torch.bincount(values, minlength=top_k + 1).tolist()
    occurring = [count for count in range(top_k + 1) if counts[count] > 0]
    lines = []
    for slots in range(occurring[0], occurring[-1] + 1):
        bar = "#" * round(BAR_WIDTH * counts[slots] / max(counts))
        lines.append(f"  {slots:>2} zero slots  {counts[slots]:>6} tokens  {bar}".rstrip())
    return lines


def run(options: argparse.Namespace) -> bool:
    """Prints the report; True if zexpert's output passes the error rule."""
    dtype = DTYPES[options.dtype]
    text, source = read_text(options.text, options.tokens)
    words = split_words(text)[: options.tokens]
    if not words:
        raise UserError(f"--text {source} has no words in it")
    intermediate_size = options.hidden_size // 2

    layer = RandomLayer(options.hidden_size, intermediate_size, dtype, options.seed)
    hidden_states = embed(words, options.hidden_size).to(dtype)
    router_logits = layer.router_logits(hidden_states)

    routing = layer.zexpert_layer.router.select_experts(hidden_states, router_logits)
    ours = layer.zexpert_layer(hidden_states, router_logits)
    plain = layer.plain(hidden_states, router_logits)
    reference = layer.plain(hidden_states.double(), router_logits.double())

    clear = layer.clear_choices(router_logits)
    our_error = (ours.double() - reference).abs()[clear].max().item() if clear.any() else 0.0
    plain_error = (plain.double() - reference).abs()[clear].max().item() if clear.any() else 0.0
    largest = reference.abs().max().item()
    agrees = our_error <= 2.0 * plain_error + torch.finfo(dtype).eps * largest

    zero_slots = (routing.topk_ids < 0).sum(dim=1)
    ffn_slots = TOP_K - zero_slots
    zero_time, plain_time = median_seconds(
        [lambda: layer.zexpert_layer(hidden_states, router_logits), lambda: layer.plain(hidden_states, router_logits)],
        options.repeats,
    )

    mean_zero = zero_slots.double().mean().item()
    rows = [
        ("text", f"{len(words)} words, {len(set(words))} different, from {source}"),
        ("experts", f"{NUM_REAL_EXPERTS} FFN + {NUM_IDENTITY_EXPERTS} identity, {TOP_K} per token, softmax with bias"),
        ("sizes", f"hidden {options.hidden_size}, expert ffn {intermediate_size}, {options.dtype}, random weights"),
        ("threads", str(torch.get_num_threads())),
        ("", ""),
        ("largest output value", f"{largest:.3g}"),
        ("max error, zexpert", f"{our_error:.2e} against the float64 reference"),
        ("max error, plain PyTorch", f"{plain_error:.2e}"),
        ("agreement", "yes (at most twice plain PyTorch's error)" if agrees else "NO"),
        ("", ""),
        ("FFN slots per token", f"{TOP_K - mean_zero:.2f} mean, {ffn_slots.min()} to {ffn_slots.max()}"),
        ("zero slots per token", f"{mean_zero:.2f} mean, {zero_slots.min()} to {zero_slots.max()}"),
        ("feed-forward work saved", f"{100 * mean_zero / TOP_K:.0f}% of {len(words) * TOP_K} slots"),
        ("", ""),
        ("time, plain PyTorch", f"{1e3 * plain_time:.2f} ms"),
        ("time, zexpert", f"{1e3 * zero_time:.2f} ms"),
        ("speed-up", f"{plain_time / zero_time:.2f}x"),
    ]
    for name, value in rows:
        print(f"{name:<26}{value}".rstrip())
    print("\nzero slots per token")
    print("\n".join(histogram(zero_slots, TOP_K)))
    unclear = len(words) - int(clear.sum())
    if unclear:
        print(f"\n{unclear} tokens choose between keys too close to call in float32; their errors are left out.")
    return agrees


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A mixture-of-experts layer with identity experts on a real text.")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's documentation strings")
    parser.add_argument("--tokens", type=int, default=2048, help="words of the text (default 2048)")
    parser.add_argument("--hidden-size", type=int, default=256, help="expert ffn is half of it (default 256)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each layer, fewer if slow (default 5)")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    for name, least in (("tokens", 1), ("hidden_size", 2), ("seed", 0), ("threads", 1), ("repeats", 1)):
        value = getattr(options, name)
        if not least <= value < 2**63:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least} and below 2^63, got {value}")
    weight_bytes = 3 * NUM_REAL_EXPERTS * options.hidden_size * (options.hidden_size // 2) * 4
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * weight_bytes > memory_bytes:
        raise UserError(
            f"--hidden-size {options.hidden_size} needs {2 * weight_bytes / 1e9:.1f} GB for weights, twice while they"
            f" are made; this machine has {memory_bytes / 1e9:.1f} GB"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        check_options(options)
        torch.set_num_threads(options.threads)
        with torch.inference_mode():
            return 0 if run(options) else 1
    except UserError as error:
        print(f"longcat_layer.py: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "zexpert":
            raise
        print(
            "longcat_layer.py: zexpert is not installed here; run `make install`, or `pip install .` first",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the reader of a pipe had enough
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
