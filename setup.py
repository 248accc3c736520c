# SPDX-License-Identifier: Apache-2.0
"""Builds the three binaries of the wheel with torch.utils.cpp_extension.

zexpert/lib/libzexpert.so       operator schemas and CPU kernels, on PyTorch's stable ABI; no Python, no libtorch_python
zexpert/lib/libzexpert_cuda.so  CUDA kernels, likewise; built if ZEXPERT_CUDA allows it
zexpert/_C.*.so                 the pybind11 module; no PyTorch

Environment:
    ZEXPERT_CUDA          auto (default): with CUDA if this PyTorch has it and nvcc is found; on: an error if not; off
    TORCH_CUDA_ARCH_LIST  GPU architectures, such as "9.0a"; default 8.0, 9.0a and 10.0 with PTX, where nvcc has them
    MAX_JOBS              compilers run at a time
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)  # setuptools wants source paths relative to this file


def find_cuda_home() -> str | None:
    """The CUDA toolkit's folder: named by the environment, else around nvcc, else /usr/local/cuda."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return named
    nvcc = shutil.which("nvcc")
    around_nvcc = [Path(path).parent.parent for path in (nvcc, os.path.realpath(nvcc))] if nvcc else []
    for home in [*around_nvcc, Path("/usr/local/cuda")]:
        # nvcc in PATH can be a wrapper script that lives outside the toolkit.
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            return str(home)
    return None


CUDA_HOME = find_cuda_home()
if CUDA_HOME is not None:
    os.environ["CUDA_HOME"] = CUDA_HOME  # read when torch.utils.cpp_extension is imported

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler, include_paths, library_paths
except ImportError as error:
    sys.exit(
        f"error: building zexpert needs the package {error.name}; with --no-build-isolation it must be installed "
        "beforehand: pip install 'torch>=2.10' 'pybind11>=3.0' ninja 'setuptools>=77' wheel"
    )

if shutil.which("ninja") is None:
    # The package may be there without its environment's bin folder in PATH; BuildExtension looks in PATH alone.
    try:
        import ninja
    except ImportError:
        sys.exit("error: building zexpert needs ninja: pip install ninja")
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])

TORCH_ABI_TARGET = "2.10"


def torch_target_version() -> str:
    """TORCH_ABI_TARGET as torch/csrc/stable/version.h spells it: major in the highest byte, minor in the next."""
    major, minor = (int(part) for part in TORCH_ABI_TARGET.split("."))
    return f"0x{(major << 56) | (minor << 48):016x}"


def package_version() -> str:
    text = (ROOT / "python/zexpert/_version.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        sys.exit("error: python/zexpert/_version.py states no __version__")
    return found.group(1)


def git_revision() -> str:
    """The commit being built, with "-dirty" if tracked files differ from it; "unknown" outside zexpert's repository."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-c", f"safe.directory={ROOT}", *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An unpacked source archive may be inside another repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        revision = git("rev-parse", "--short=12", "HEAD")
        return f"{revision}-dirty" if git("status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass
class CudaBuild:
    """Whether the CUDA library is built, why, and for which architectures."""

    enabled: bool
    reason: str
    architectures: list[str]


def nvcc_output(*arguments: str) -> str:
    return subprocess.run([f"{CUDA_HOME}/bin/nvcc", *arguments], check=True, capture_output=True, text=True).stdout


def nvcc_major_version() -> int:
    release = re.search(r"release (\d+)\.\d+", nvcc_output("--version"))
    if release is None:
        sys.exit(f"error: {CUDA_HOME}/bin/nvcc --version names no release")
    return int(release.group(1))


def default_architectures() -> list[str]:
    """A100, H100/H200 and B200, as far as nvcc knows them, and PTX for whatever comes later."""
    known = nvcc_output("--list-gpu-arch").split()
    wanted = [("compute_80", "8.0"), ("compute_90", "9.0a"), ("compute_100", "10.0")]
    architectures = [architecture for name, architecture in wanted if name in known]
    if not architectures:
        sys.exit("error: nvcc knows none of compute_80, compute_90 and compute_100; set TORCH_CUDA_ARCH_LIST")
    # Code for 9.0a runs on no later GPU, so PTX for 9.0 stands in where that is the newest.
    if architectures[-1] == "9.0a":
        return [*architectures, "9.0+PTX"]
    return [*architectures[:-1], architectures[-1] + "+PTX"]


def decide_cuda() -> CudaBuild:
    mode = os.environ.get("ZEXPERT_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        sys.exit(f'error: ZEXPERT_CUDA must be "auto", "on" or "off", got "{mode}"')
    if mode == "off":
        return CudaBuild(False, "ZEXPERT_CUDA=off", [])

    obstacle = None
    if torch.version.cuda is None:
        obstacle = f"PyTorch {torch.__version__} has no CUDA"
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        obstacle = "nvcc is not found; set CUDA_HOME to the CUDA toolkit"
    elif nvcc_major_version() != int(torch.version.cuda.split(".")[0]):
        obstacle = f"nvcc in {CUDA_HOME} is of CUDA {nvcc_major_version()}, PyTorch of CUDA {torch.version.cuda}"
    if obstacle is not None:
        if mode == "on":
            sys.exit(f"error: ZEXPERT_CUDA=on, but {obstacle}")
        return CudaBuild(False, obstacle, [])

    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    architectures = listed or default_architectures()
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)  # read by BuildExtension
    return CudaBuild(True, f"nvcc in {CUDA_HOME}, PyTorch of CUDA {torch.version.cuda}", architectures)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def operator_sources() -> list[str]:
    """Files that register operators, compiled for each device: see csrc/torch/device.h."""
    return [path for path in sources("csrc/torch/*.cpp") if '#include "torch/device.h"' in Path(path).read_text()]


HEADERS = sources("csrc/**/*.h", "csrc/**/*.cuh")
INCLUDE_DIRS = [str(ROOT / "csrc/include"), str(ROOT / "csrc")]  # ninja runs elsewhere
# -g0 and -O3 override what Python's own build configuration passes. Others' headers are system headers: no warnings.
# A switch that lacks an enumerator is an error: it would compute another scoring function or type.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-Werror=switch", "-fvisibility-inlines-hidden"]
# Nothing else is visible outside, least of all a C++ runtime that some machines' compilers link statically: exceptions
# that cross two of them crash the process.
EXPORTS = "csrc/exports.map"
MODULE_EXPORTS = "csrc/python/exports.map"


def system_includes(*paths: str) -> list[str]:
    return [flag for path in paths for flag in ("-isystem", path)]


def torch_link_flags(*libraries: str) -> list[str]:
    """Flags that record every library as needed: the loader finds PyTorch's symbols through those records alone."""
    return ["-Wl,--no-as-needed", *(f"-l{library}" for library in libraries), "-Wl,--as-needed"]


def core_library() -> Extension:
    return Extension(
        "zexpert.lib.libzexpert",
        sources("csrc/cpu/*.cpp", "csrc/torch/*.cpp"),
        depends=[*HEADERS, EXPORTS],
        include_dirs=list(INCLUDE_DIRS),
        library_dirs=library_paths(),
        extra_compile_args={
            "cxx": [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={torch_target_version()}", *system_includes(*include_paths())]
        },
        extra_link_args=[f"-Wl,--version-script={EXPORTS}", *torch_link_flags("torch_cpu")],
        language="c++",
    )


def cuda_library() -> Extension:
    flags = [f"-DTORCH_TARGET_VERSION={torch_target_version()}", "-DUSE_CUDA", "-DZEXPERT_FOR_CUDA"]
    flags += system_includes(*include_paths(device_type="cuda"))
    # With the static runtime no second libcudart, of the toolkit's version, is loaded next to PyTorch's.
    static_runtime = any(Path(path, "libcudart_static.a").exists() for path in library_paths(device_type="cuda"))
    runtime = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"] if static_runtime else ["-lcudart"]
    host_flags = "-Wall,-Wextra,-Werror=switch,-fvisibility-inlines-hidden"
    nvcc_flags = ["-std=c++17", "-O3", "-lineinfo", f"-Xcompiler={host_flags}"]
    if nvcc_major_version() >= 13:
        nvcc_flags.append("--compress-mode=size")  # a fifth of the size; every driver for CUDA 13 can unpack it
    return Extension(
        "zexpert.lib.libzexpert_cuda",
        [*sources("csrc/cuda/**/*.cu"), *operator_sources()],
        depends=[*HEADERS, EXPORTS],
        include_dirs=list(INCLUDE_DIRS),
        library_dirs=library_paths(device_type="cuda"),
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *flags],
            "nvcc": [*nvcc_flags, *flags],
        },
        extra_link_args=[f"-Wl,--version-script={EXPORTS}", *torch_link_flags("torch_cpu", "torch_cuda"), *runtime],
        language="c++",
    )


def python_module() -> Extension:
    return Extension(
        "zexpert._C",
        sources("csrc/python/*.cpp", "csrc/cpu/kernel_plan.cpp"),
        depends=[*HEADERS, MODULE_EXPORTS],
        include_dirs=list(INCLUDE_DIRS),
        extra_compile_args={"cxx": [*CXX_FLAGS, "-fvisibility=hidden", *system_includes(pybind11.get_include())]},
        extra_link_args=[f"-Wl,--version-script={MODULE_EXPORTS}"],
        language="c++",
    )


class BuildPython(build_py):
    """build_py that starts from an empty folder: a module deleted since the last build must not travel in a wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            for package in ("zexpert", "zexpert_plugins", "zexpert_tools"):
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()


class BuildLibraries(BuildExtension):
    """BuildExtension that keeps objects between builds and gives shared libraries their plain names."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install would build in a temporary folder and so compile everything every time.
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{tag}")

    def get_ext_filename(self, fullname: str) -> str:
        # Called with and without the package in the name. The libraries are no Python modules: they have no ABI suffix.
        if fullname.rpartition(".")[2] in ("libzexpert", "libzexpert_cuda"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        print_summary()
        config = self.write_build_config()
        for extension in self.extensions:
            extension.include_dirs.append(config)
        # Python's own linker flags name the folder Python was built in; nothing here links libpython.
        self.compiler.linker_so_cxx = [
            flag for flag in self.compiler.linker_so_cxx if not flag.startswith(("-L", "-Wl,-rpath"))
        ]
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        # A build.ninja of its own for each extension, so that none forgets what another compiled.
        common_build_temp = self.build_temp
        self.build_temp = os.path.join(common_build_temp, ext.name.rpartition(".")[2])
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = common_build_temp

    def copy_extensions_to_source(self) -> None:
        libraries = ROOT / "python" / "zexpert" / "lib"
        libraries.mkdir(exist_ok=True)
        # Remove what an earlier build with other options left: it must not be loaded with this build.
        made = {extension.name.rpartition(".")[2] for extension in self.extensions}
        for path in libraries.glob("*.so"):
            if path.stem not in made:
                path.unlink()
        super().copy_extensions_to_source()

    def write_build_config(self) -> str:
        """Writes the header with version and build settings; returns its folder.

        A header that would not change is kept, so that nothing is compiled again.
        """
        values = {
            "ZEXPERT_VERSION": package_version(),
            "ZEXPERT_GIT_REVISION": git_revision(),
            "ZEXPERT_TORCH_ABI_TARGET": TORCH_ABI_TARGET,
            "ZEXPERT_TORCH_BUILD_VERSION": str(torch.__version__),
            "ZEXPERT_CUDA_ARCHS": ";".join(CUDA.architectures),
        }
        template = (ROOT / "csrc" / "zexpert_build_config.h.in").read_text()
        text = re.sub(r"@(\w+)@", lambda placeholder: values[placeholder.group(1)], template)
        path = Path(self.build_temp, "config", "zexpert_build_config.h")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return str(path.parent)


def print_summary() -> None:
    compiler = get_cxx_compiler()
    version = f"{compiler} (not found)"
    if shutil.which(compiler) is not None:
        reply = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
        version = reply.splitlines()[0]
    cuda = f"yes ({CUDA.reason})" if CUDA.enabled else f"no ({CUDA.reason})"
    lines = {
        "version": f"{package_version()}, git revision {git_revision()}",
        "PyTorch": f"{torch.__version__}, stable ABI of {TORCH_ABI_TARGET}",
        "compiler": version,
        "CUDA library": cuda,
    }
    if CUDA.enabled:
        lines["architectures"] = " ".join(CUDA.architectures)
    width = max(len(name) for name in lines)
    table = "\n".join(f"  {name:<{width}}  {value}" for name, value in lines.items())
    print(f"zexpert build\n{table}\n", flush=True)


CUDA = decide_cuda()

setup(
    ext_modules=[core_library(), *([cuda_library()] if CUDA.enabled else []), python_module()],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibraries},
)
