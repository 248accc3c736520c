# SPDX-License-Identifier: Apache-2.0
"""Audits wheels, then installs each in fresh environments and runs check_installed.py there.

Each environment has the wheel and the PyTorch of another environment, named by its Python with --torch.

Usage: python check_wheels.py WHEEL... --torch PYTHON [--torch PYTHON]... --oldest-torch PYTHON
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

LARGEST_WHEEL = 20_000_000  # bytes
CHECK = Path(__file__).with_name("check_installed.py")


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def site_packages_of(python: str | Path) -> str:
    return output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()


def symbols(library: Path, *options: str) -> set[str]:
    """Names of a library's dynamic symbols, without versions."""
    lines = output_of("nm", "--dynamic", "--format=posix", *options, library).splitlines()
    return {line.split()[0].partition("@")[0] for line in lines}


def audit(wheel: Path, torch_libraries: list[Path] | None) -> list[str]:
    """What is wrong with the wheel's libraries: C++ symbols of PyTorch's, which change from one version to the next;
    shims that none of `torch_libraries`, the oldest supported PyTorch's, has; links to what must not be needed."""
    problems = []
    if wheel.stat().st_size > LARGEST_WHEEL:
        problems.append(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {LARGEST_WHEEL}")
    shims: set[str] = set()
    for library in torch_libraries or []:
        shims |= symbols(library, "--defined-only")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [Path(archive.extract(name, folder)) for name in archive.namelist() if name.endswith(".so")]
        if not any(library.name == "libzexpert.so" for library in libraries):
            problems.append(f"{wheel.name} has no libzexpert.so")
        for library in libraries:
            undefined = symbols(library, "--undefined-only")
            unstable = [name for name in undefined if re.match(r"_Z\w*(2at|3c10|5torch|6caffe2)\d", name)]
            problems += [f"{library.name} uses {name}, which is not part of the stable ABI" for name in unstable]
            if torch_libraries:
                wanted = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
                problems += [f"{library.name} uses {name}, which the oldest PyTorch lacks" for name in wanted - shims]
            needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "--dynamic", library))
            # pybind11's module finds Python's symbols in the process.
            problems += [f"{library.name} links {name}" for name in needed if "python" in name or "cudart" in name]
    return problems


def check_installed(wheel: Path, python: str) -> None:
    """Installs the wheel into a fresh environment with `python`'s PyTorch and runs CHECK there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        fresh = Path(folder, "bin/python")
        site_packages = site_packages_of(fresh)
        install = [sys.executable, "-m", "pip", "--python", fresh, "install", "--quiet", "--no-deps", wheel]
        subprocess.run(install, check=True)
        shutil.rmtree(Path(site_packages, "zexpert_tools"))  # the library must work without the command
        Path(site_packages, "torch_of_another_environment.pth").write_text(site_packages_of(python) + "\n")
        subprocess.run([fresh, "-W", "ignore", CHECK, site_packages], check=True, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--torch", action="append", default=[], metavar="PYTHON")
    parser.add_argument("--oldest-torch", metavar="PYTHON")
    arguments = parser.parse_args()

    torch_libraries = None
    if arguments.oldest_torch:
        torch_libraries = sorted(Path(site_packages_of(arguments.oldest_torch), "torch/lib").glob("libtorch_c*.so"))
    for wheel in arguments.wheels:
        problems = audit(wheel, torch_libraries)
        if problems:
            sys.exit("\n".join(problems))
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, nothing but the stable ABI", flush=True)
        for python in [*arguments.torch, *filter(None, [arguments.oldest_torch])]:
            check_installed(wheel, python)


if __name__ == "__main__":
    main()
