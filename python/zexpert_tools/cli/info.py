# SPDX-License-Identifier: Apache-2.0
"""`zexpert info`: versions, devices, and which operators run where."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from zexpert import build_info, ops
from zexpert.ops._autograd import NOT_DIFFERENTIABLE
from zexpert_tools.benchmark.machine import processor_name
from zexpert_tools.cli.terminal import console, print_table

#: Packages that the extras name, or that zexpert works with.
OPTIONAL_PACKAGES = ("transformers", "vllm", "sglang", "flashinfer-python", "typer", "rich", "matplotlib")


def collect() -> dict[str, Any]:
    """Everything that `zexpert info` prints, as plain values."""
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()},
        "zexpert": dict(build_info()),
        "torch": {"version": str(torch.__version__), "cuda": torch.version.cuda, "threads": torch.get_num_threads()},
        "devices": devices(),
        "operators": operators(),
        "packages": {name: version for name in OPTIONAL_PACKAGES if (version := installed_version(name))},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("ZEXPERT_")},
    }


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """The processor, then the GPUs that PyTorch can use."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": processor_name(),
            "cores": os.cpu_count(),
            "capability": build_info()["cpu_capability"],
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def operators() -> dict[str, dict[str, bool]]:
    """For each operator, whether it has a kernel for the CPU, for CUDA in this process, and a derivative."""
    registered = {name.removeprefix("zexpert::").partition(".")[0] for name in registered_operators()}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name: {
            "cpu": has(f"zexpert::{name}", "CPU"),
            "cuda": has(f"zexpert::{name}", "CUDA"),
            "backward": has(f"zexpert::{name}", "Autograd") and name not in NOT_DIFFERENTIABLE,
        }
        for name in sorted(registered.intersection(ops.__all__))
    }


def registered_operators() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zexpert::")]


def info(json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """Show versions, what was built against what runs, devices, and which operators run where."""
    known = collect()
    if json_output:
        print(json.dumps(known, indent=2))
        return
    built = known["zexpert"]
    archs = f", GPU architectures {' '.join(built['cuda_archs'])}" if built["cuda_archs"] else ""
    toolkit = f", CUDA {built['cuda_toolkit']}" if built["cuda_toolkit"] else ""
    torch_cuda = f"with CUDA {known['torch']['cuda']}" if known["torch"]["cuda"] else "without CUDA"

    versions = table("", "")
    versions.add_row("version", f"{built['version']} (revision {built['git_revision']})")
    versions.add_row("built with", f"{built['compiler']}, PyTorch {built['torch_build_version']}{toolkit}{archs}")
    versions.add_row("runs under", f"PyTorch {built['torch_version']} {torch_cuda}")
    versions.add_row("serves", f"PyTorch {built['torch_abi_target']} and later")
    versions.add_row("CUDA library", built["cuda_library"])
    versions.add_row("Python", f"{known['python']['version']} on {known['python']['system']}")
    for name, version in known["packages"].items():
        versions.add_row(name, version)
    for name, value in known["environment"].items():
        versions.add_row(name, value)
    print_table(console, "zexpert", versions)

    found = table("device", "name", "")
    for one in known["devices"]:
        if one["device"] == "cpu":
            found.add_row("cpu", one["name"], f"{one['cores']} cores, kernels for {one['capability']}")
        else:
            memory = f"{one['memory_bytes'] / 2**30:.0f} GiB"
            found.add_row(one["device"], one["name"], f"{memory}, compute capability {one['capability']}")
    print_table(console, "devices", found)

    available = table("operator", "CPU", "CUDA", "gradient")
    for name, where in known["operators"].items():
        available.add_row(name, *("yes" if where[key] else "no" for key in ("cpu", "cuda", "backward")))
    print_table(console, "operators", available)


def table(*columns: str) -> Table:
    made = Table(show_header=any(columns))
    for column in columns:
        made.add_column(column, overflow="fold")
    return made
