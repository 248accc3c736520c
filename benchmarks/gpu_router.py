# SPDX-License-Identifier: Apache-2.0
"""Times router_logits on a CUDA device against torch's linear in float32, TF32 and bfloat16.

Usage: python benchmarks/gpu_router.py [--tokens 1,1024] [--shapes 6144x768] [--dtype bfloat16] [--json PATH]

Hidden states are bfloat16 and the weight is float32. The other contenders get both in their own type, converted before.
Every contender runs in CUDA graphs, over hidden states and weights that together exceed the L2 cache. The floor is the
larger of the time to read hidden states and weight and to write the logits at the speed of a device copy, and of the
time of two bfloat16 products at the speed of a large matrix product. TF32 and bfloat16 are timed for comparison. Their
outputs are not held against the error rule, since they do not have float32's accuracy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from zexpert.ops import router_logits
from zexpert_tools.benchmark import harness
from zexpert_tools.benchmark.cuda import head, require_gpu

SUBJECT = "zexpert"
CHECKED_TOKENS = 1024
TOKENS = (1, 16, 128, 1024, 8192, 16384)
SHAPES = {
    "6144x768": "LongCat-Flash",
    "3072x384": "LongCat-Flash-Lite",
    "8192x896": "LongCat-2.0",
    "2048x192": "small",
    "7168x256": "DeepSeek-V3",
}


@dataclass(frozen=True)
class Inputs:
    hidden_states: Tensor  # [T, H]
    weight: Tensor  # [N, H], float32
    hidden_states_float32: Tensor
    weight_bfloat16: Tensor

    @staticmethod
    def make(num_tokens: int, hidden_size: int, num_experts: int, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator("cuda").manual_seed(seed)
        hidden_states = torch.randn(num_tokens, hidden_size, device="cuda", generator=generator).to(dtype)
        weight = 0.02 * torch.randn(num_experts, hidden_size, device="cuda", generator=generator)
        return Inputs(hidden_states, weight, hidden_states.float(), weight.bfloat16())


def ours(inputs: Inputs) -> Tensor:
    return router_logits(inputs.hidden_states, inputs.weight)


def linear(inputs: Inputs) -> Tensor:
    torch.backends.cuda.matmul.allow_tf32 = False
    return functional.linear(inputs.hidden_states_float32, inputs.weight)


def linear_tf32(inputs: Inputs) -> Tensor:
    torch.backends.cuda.matmul.allow_tf32 = True
    logits = functional.linear(inputs.hidden_states_float32, inputs.weight)
    torch.backends.cuda.matmul.allow_tf32 = False
    return logits


def linear_bfloat16(inputs: Inputs) -> Tensor:
    return functional.linear(inputs.hidden_states.bfloat16(), inputs.weight_bfloat16)


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {
    SUBJECT: ours,
    "float32": linear,
    "TF32": linear_tf32,
    "bfloat16": linear_bfloat16,
}
ACCURATE = (SUBJECT, "float32")


def run_case(
    name: str, shape: str, num_tokens: int, dtype: torch.dtype, repeats: int, limits: harness.Limits
) -> harness.CaseResult:
    hidden_size, num_experts = map(int, shape.split("x"))
    num_bytes = num_tokens * (hidden_size * dtype.itemsize + num_experts * 4) + num_experts * hidden_size * 4
    count = harness.inputs_to_rotate(torch.device("cuda"), num_bytes, len(CONTENDERS))
    inputs = [Inputs.make(num_tokens, hidden_size, num_experts, dtype, seed) for seed in range(count)]
    few = slice(0, CHECKED_TOKENS)
    expected = inputs[0].hidden_states[few].double() @ inputs[0].weight.double().t()
    plain = linear(inputs[0])[few]
    checks = {
        contender: harness.check_error(CONTENDERS[contender](inputs[0])[few], plain, expected) for contender in ACCURATE
    }
    runs = {contender: harness.on_inputs(run, inputs) for contender, run in CONTENDERS.items()}
    timings = harness.measure_on(torch.device("cuda"), runs, num_inputs=count, repeats=repeats)
    operations = 2 * 2 * num_tokens * hidden_size * num_experts
    return harness.CaseResult(
        case=f"{name} ({shape}), {harness.counted(num_tokens, 'token')}, {harness.dtype_name(dtype)}",
        subject=SUBJECT,
        floor=limits.floor(operations, num_bytes),
        timings=timings,
        checks=checks,
        other_load=0.0,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=harness.positive_ints, default=list(TOKENS))
    parser.add_argument(
        "--shapes",
        type=harness.names_of(SHAPES),
        default=list(SHAPES),
        help="hidden size by experts, of " + ", ".join(SHAPES),
    )
    parser.add_argument("--dtype", default="bfloat16", choices=harness.DTYPES, help="of the hidden states")
    parser.add_argument("--repeats", type=harness.positive_int, default=20)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    require_gpu(parser)
    limits = harness.measure_limits(torch.device("cuda"), torch.bfloat16)
    print(head(limits.bandwidth))
    results = []
    for shape in options.shapes:
        for num_tokens in options.tokens:
            dtype = harness.DTYPES[options.dtype]
            results.append(run_case(SHAPES[shape], shape, num_tokens, dtype, options.repeats, limits))
            harness.print_case(results[-1])
    settings = {"dtype": options.dtype, "copy_bandwidth": limits.bandwidth, "matmul_rate": limits.rate}
    return harness.finish("gpu_router", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
