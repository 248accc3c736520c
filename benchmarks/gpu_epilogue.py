# SPDX-License-Identifier: Apache-2.0
"""Times the layer's epilogue, moe_finalize, on a CUDA device against the same sum composed of torch operations.

Usage: python benchmarks/gpu_epilogue.py [--tokens 1,128,1024,16384,65536] [--repeats 20] [--json PATH]

LongCat-Flash's shape: hidden size 6144, bfloat16, 12 slots per token of which about 8 chose a real expert; the others
add zero_weight * hidden_states. The floor reads those rows and the token and writes the output, at the speed of a
device copy. Every contender runs in CUDA graphs, over inputs that together exceed the L2 cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from zexpert_tools.benchmark import epilogue, harness, parse
from zexpert_tools.benchmark.cuda import copy_bandwidth, head, require_gpu
from zexpert_tools.benchmark.torch_routing import LONGCAT_FLASH

HIDDEN_SIZE = 6144
TOKENS = (1, 16, 128, 1024, 16384, 65536)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=parse.positive_ints, default=list(TOKENS))
    parser.add_argument("--dtype", default="bfloat16", choices=harness.DTYPES)
    parser.add_argument("--repeats", type=parse.positive_int, default=20)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    require_gpu(parser)
    bandwidth = copy_bandwidth()
    print(head(bandwidth))
    results = []
    for num_tokens in options.tokens:
        results.append(
            epilogue.run_case(
                LONGCAT_FLASH,
                HIDDEN_SIZE,
                num_tokens,
                dtype=harness.DTYPES[options.dtype],
                device=torch.device("cuda"),
                repeats=options.repeats,
                bandwidth=bandwidth,
                with_compile=True,
            )
        )
        harness.print_case(results[-1])
    settings = {"dtype": options.dtype, "copy_bandwidth": bandwidth}
    return harness.finish("gpu_epilogue", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
