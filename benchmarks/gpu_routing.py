# SPDX-License-Identifier: Apache-2.0
"""Times zexpert's routing on a CUDA device against the same routing composed of torch operations, eager and compiled,
and against the kernels of vLLM and FlashInfer where these are installed.

Usage: python benchmarks/gpu_routing.py [--tokens 1,8192] [--cases 768,384] [--json PATH]

Every contender runs in CUDA graphs of many calls, over inputs that together exceed the L2 cache wherever one token more
than a few makes that possible, so that neither launching nor the cache is measured in place of the kernel. "with the
plan" is biased_topk_and_plan. The floor is the time to read the logits and to write the results, as fast as a device
copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from zexpert_tools.benchmark import harness, parse, routing
from zexpert_tools.benchmark.cuda import copy_bandwidth, head, require_gpu
from zexpert_tools.benchmark.harness import CaseResult
from zexpert_tools.benchmark.torch_routing import LONGCAT_FLASH, RoutingCase

CASES = {
    "768": LONGCAT_FLASH,
    "384": RoutingCase("LongCat-Flash-Lite", 256, 128, 0, 12, has_bias=True),
    "896": RoutingCase("LongCat-2.0", 768, 128, 0, 12, has_bias=True),
    "256": RoutingCase("256 experts, sigmoid", 256, 0, 0, 8, "sigmoid", True, True, 2.5),
}
TOKENS = (1, 16, 128, 1024, 8192, 65536)


def microseconds(result: CaseResult, name: str) -> str:
    return f"{result.timings[name].median * 1e6:.2f}" if name in result.timings else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=parse.positive_ints, default=list(TOKENS))
    cases = parse.names_of(CASES)
    parser.add_argument("--cases", type=cases, default=list(CASES), help="expert counts, of " + ", ".join(CASES))
    parser.add_argument("--dtype", default="float32", choices=harness.DTYPES, help="of the logits")
    parser.add_argument("--repeats", type=parse.positive_int, default=20)
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args(arguments)
    require_gpu(parser)

    bandwidth = copy_bandwidth()
    print(head(bandwidth))
    results = []
    for name in options.cases:
        case, device = CASES[name], torch.device("cuda")
        peers = routing.installed_peers(case, device)
        for num_tokens in options.tokens:
            torch.compiler.reset()
            results.append(
                routing.run_case(
                    case,
                    num_tokens,
                    dtype=harness.DTYPES[options.dtype],
                    device=device,
                    repeats=options.repeats,
                    bandwidth=bandwidth,
                    others={
                        "zexpert, with the plan": routing.with_plan(case),
                        "torch.compile": routing.compiled(case),
                        **peers,
                    },
                )
            )
            harness.print_case(results[-1])
    names = list(dict.fromkeys(name for result in results for name in result.timings))
    table = [
        [result.case, *(microseconds(result, name) for name in names), f"{result.floor * 1e6:.2f}",
         f"{100 * result.floor / result.timings[routing.SUBJECT].median:.0f}%"]
        for result in results
    ]  # fmt: skip
    print("\nmedians in microseconds")
    print(harness.format_table(["case", *names, "floor", "share of floor"], table))
    settings = {"tokens": options.tokens, "cases": options.cases, "dtype": options.dtype, "copy_bandwidth": bandwidth}
    return harness.finish("gpu_routing", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
