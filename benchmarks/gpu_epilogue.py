"""Times the layer's epilogue, moe_finalize, on a CUDA device against the same sum composed of torch operations.

Usage: python benchmarks/gpu_epilogue.py [--tokens 1,128,1024,16384,65536] [--repeats 20] [--json PATH]

LongCat-Flash's shape: hidden size 6144, bfloat16, 12 slots per token of which about 8 chose a real expert; the others
add zero_weight * hidden_states. The floor reads those rows and the token and writes the output, at the speed of a
device copy. Every contender runs in CUDA graphs, over inputs that together exceed the L2 cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import harness
import zexpert
from gpu_harness import copy_bandwidth, graph_seconds, head, require_gpu
from harness import CaseResult

HIDDEN, TOP_K, REAL, ZERO = 6144, 12, 512, 256
TOKENS = (1, 16, 128, 1024, 16384, 65536)
SUBJECT = "zexpert"
CHECKED_TOKENS = 256


@dataclass(frozen=True)
class Inputs:
    rows: Tensor
    slot_rows: Tensor
    topk_weights: Tensor
    hidden_states: Tensor
    zero_weight: Tensor

    def first(self, num_tokens: int) -> Inputs:
        tokens = slice(0, num_tokens)
        return Inputs(
            self.rows,
            self.slot_rows[tokens],
            self.topk_weights[tokens],
            self.hidden_states[tokens],
            self.zero_weight[tokens],
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        """Every token's own rows alone, in another dtype."""
        slots = self.slot_rows.flatten().long().clamp(min=0)
        own = torch.arange(slots.numel(), device=slots.device).reshape(self.slot_rows.shape)
        return Inputs(
            self.rows[slots].to(dtype),
            torch.where(self.slot_rows >= 0, own, -1).int(),
            self.topk_weights.to(dtype),
            self.hidden_states.to(dtype),
            self.zero_weight.to(dtype),
        )


def make_inputs(num_tokens: int, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)
    experts = torch.rand(num_tokens, REAL + ZERO, device="cuda", generator=generator).topk(TOP_K).indices
    is_real = experts < REAL
    plan = zexpert.ops.moe_plan(torch.where(is_real, experts, -1), REAL)
    weights = torch.rand(num_tokens, TOP_K, device="cuda", generator=generator)
    return Inputs(
        torch.randn(num_tokens * TOP_K, HIDDEN, device="cuda", generator=generator).to(dtype),
        plan.slot_rows,
        weights * is_real,
        torch.randn(num_tokens, HIDDEN, device="cuda", generator=generator).to(dtype),
        (weights * ~is_real).sum(1),
    )


def epilogue(inputs: Inputs) -> Tensor:
    return zexpert.ops.moe_finalize(
        inputs.rows, inputs.slot_rows, inputs.topk_weights, inputs.hidden_states, inputs.zero_weight
    )


def composed(inputs: Inputs) -> Tensor:
    """Rows back in slot order, those without work as zeros, then one weighted sum and the zero part."""
    taken = inputs.rows[inputs.slot_rows.clamp(min=0).long()]
    weights = inputs.topk_weights.masked_fill(inputs.slot_rows < 0, 0).to(taken.dtype)
    summed = torch.einsum("tk,tkh->th", weights, taken)
    return summed + inputs.zero_weight[:, None].to(taken.dtype) * inputs.hidden_states


def run_case(num_tokens: int, dtype: torch.dtype, repeats: int, bandwidth: float) -> CaseResult:
    row_bytes = HIDDEN * dtype.itemsize
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    num_inputs = max(2, min(64, 2 * l2_bytes // (num_tokens * TOP_K * row_bytes) + 1))
    inputs = [make_inputs(num_tokens, dtype, seed) for seed in range(num_inputs)]
    num_rows = sum(int((one.slot_rows >= 0).sum()) for one in inputs) / num_inputs

    few = inputs[0].first(CHECKED_TOKENS)
    expected, plain = composed(few.to(torch.float64)), composed(few)
    contenders = {SUBJECT: epilogue, "torch.compile": torch.compile(composed, dynamic=False), "torch ops": composed}
    timings, checks = {}, {}
    torch.compiler.reset()
    for name, run in contenders.items():
        checks[name] = harness.check_error(run(inputs[0])[:CHECKED_TOKENS], plain, expected)
        calls = [lambda run=run, one=one: run(one) for one in inputs]  # type: ignore[misc]
        timings[name] = graph_seconds(calls, repeats)
    floor = (num_rows + 2 * num_tokens) * row_bytes / bandwidth
    return CaseResult(f"{num_tokens} tokens", SUBJECT, floor, timings, checks, other_load=0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=harness.positive_ints, default=list(TOKENS))
    parser.add_argument("--dtype", default="bfloat16", choices=harness.DTYPES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    require_gpu(parser)
    bandwidth = copy_bandwidth()
    print(head(bandwidth))
    results = []
    for num_tokens in options.tokens:
        results.append(run_case(num_tokens, harness.DTYPES[options.dtype], options.repeats, bandwidth))
        harness.print_case(results[-1])
    settings = {"dtype": options.dtype, "copy_bandwidth": bandwidth}
    return harness.finish("gpu_epilogue", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
