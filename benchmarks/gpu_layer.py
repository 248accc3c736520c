# SPDX-License-Identifier: Apache-2.0
"""Times zexpert.FusedMoE on a CUDA device, hidden states to output, against the same layer of torch operations.

Usage: python benchmarks/gpu_layer.py [--shapes longcat,lite,qwen3] [--tokens 1,16,...] [--json PATH] [--plot PATH]

zexpert's logits come from router_logits. The composition, "torch grouped_mm", multiplies in float32, sorts the slots by
expert, leaves those of zero experts out, and runs the rest through torch's grouped matrix product. A second case of
each size starts from given logits. Both contenders are captured in CUDA graphs. The floor is the larger of the products
at the rate of a large matrix product and the bytes of the weights used at the speed of a device copy, both measured in
the same run. Outputs of sampled tokens are checked against float64. --plot draws the roofline, from hidden states.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from zexpert_tools.benchmark import harness, parse, rates
from zexpert_tools.benchmark.cuda import head, require_gpu
from zexpert_tools.benchmark.layer import MODELS, make_weights, run_case
from zexpert_tools.benchmark.plots import save_roofline

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
DTYPE = torch.bfloat16
SHAPES = {"longcat": MODELS["longcat-flash"], "lite": MODELS["lite"], "qwen3": MODELS["qwen3-zeda"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", type=parse.names_of(SHAPES), default=list(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--tokens", type=parse.positive_ints, default=list(TOKENS))
    parser.add_argument("--repeats", type=parse.positive_int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the roofline there (needs matplotlib)")
    options = parser.parse_args(arguments)
    require_gpu(parser)
    device = torch.device("cuda")
    limits = rates.measure_limits(device, DTYPE)
    print(f"{head(limits.bandwidth)}; a matrix product runs at {limits.rate / 1e12:.0f} TFLOP/s")
    results = []
    for name in options.shapes:
        weights = [make_weights(SHAPES[name], DTYPE, device)]
        for num_tokens, router_projection in product(options.tokens, (True, False)):
            results.append(
                run_case(
                    SHAPES[name],
                    num_tokens,
                    weights,
                    limits=limits,
                    repeats=options.repeats,
                    router_projection=router_projection,
                )
            )
            harness.print_case(results[-1])
            torch.cuda.empty_cache()
    settings = {"copy_bandwidth": limits.bandwidth, "matmul_rate": limits.rate}
    code = harness.finish("gpu_layer", settings, results, options.json)
    if options.plot is not None:
        save_roofline(options.plot, results[::2], limits, device_name=torch.cuda.get_device_name())
    return code


if __name__ == "__main__":
    raise SystemExit(main())
