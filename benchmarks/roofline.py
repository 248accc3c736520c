# SPDX-License-Identifier: Apache-2.0
"""Draws the roofline of a JSON file of gpu_layer.py.

Usage: python benchmarks/roofline.py FILE.json PICTURE.png

Needs matplotlib. docs/performance.md has that of docs/benchmarks/gpu_layer.json, as docs/images/roofline_h200.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from zexpert_tools.benchmark.layer import LayerResult
from zexpert_tools.benchmark.plots import save_roofline
from zexpert_tools.benchmark.rates import Limits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE.json", help="what gpu_layer.py wrote")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    options = parser.parse_args(arguments)
    try:
        benchmark = json.loads(options.file.read_text())
        settings, gpu = benchmark["settings"], benchmark["environment"]["gpu"]
        limits = Limits(settings["copy_bandwidth"], settings["matmul_rate"])
        results = [LayerResult.from_json(result) for result in benchmark["results"]]
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {options.file}: {error}")
    except (KeyError, TypeError) as error:
        parser.error(f"{options.file} is not gpu_layer.py's: {type(error).__name__}: {error}")
    save_roofline(options.picture, results, limits, device_name=gpu)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
