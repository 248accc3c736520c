# SPDX-License-Identifier: Apache-2.0
"""`zexpert doctor`: finds and explains what keeps zexpert from working. Needs nothing but Python, not even zexpert.

What may crash runs in a process of its own (PROBE), which prints every step that it begins and ends.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

PACKAGE = Path(__file__).resolve().parents[2] / "zexpert"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)

#: One JSON object per line: the step, and what it found, or "error".
PROBE = """
import json, sys

def report(step, **found):
    print("PROBE " + json.dumps({"step": step, **found}), flush=True)

def attempt(step, run):
    report("begin " + step)
    try:
        found = run()
    except BaseException as error:
        report(step, error=f"{type(error).__name__}: {error}")
        return False
    report(step, **found)
    return True

def import_torch():
    import torch
    return {"version": str(torch.__version__), "cuda": torch.version.cuda}

def import_zexpert():
    import zexpert
    return {"file": zexpert.__file__, **zexpert.build_info()}

def find_gpus():
    import torch
    if torch.version.cuda is None:
        return {"gpus": []}
    try:
        torch.cuda.init()
    except Exception as error:
        return {"gpus": [], "reason": str(error).splitlines()[0]}
    return {"gpus": [[torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)]
                     for i in range(torch.cuda.device_count())]}

def run_layer(device):
    import torch, zexpert
    layer = zexpert.FusedMoE(8, 3, 16, 8, zero_expert_type="identity", zero_expert_num=4).to(device)
    hidden_states, router_logits = torch.randn(5, 16, device=device), torch.zeros(5, 12, device=device)
    router_logits[:, :8] = -100.0
    difference = (layer(hidden_states, router_logits) - 0.75 * hidden_states).abs().max().item()
    if not difference < 1e-5:
        raise ValueError(f"a layer with a known result is off by {difference}")
    return {}

if attempt("torch", import_torch) and attempt("zexpert", import_zexpert):
    attempt("cpu", lambda: run_layer("cpu"))
    attempt("gpus", find_gpus)
    for index in map(int, sys.argv[1:]):
        attempt(f"cuda:{index}", lambda: run_layer(f"cuda:{index}"))
"""

#: Prints the file or folder that `import zexpert` would import; imports nothing.
LOCATE = """
import importlib.util
spec = importlib.util.find_spec("zexpert")
if spec:
    print(spec.origin or next(iter(spec.submodule_search_locations)))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. A problem keeps zexpert, or a GPU from working with it; a note does not."""

    level: Literal["ok", "note", "problem"]
    what: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Every finding, in the order in which things depend on each other."""
    findings = [check_python(), *check_environment(), *check_files(), *check_shadows()]
    steps = probe()
    findings.append(check_torch(steps))
    if "version" not in steps.get("torch", {}):
        return findings
    findings.append(check_import(steps))
    if "version" not in steps.get("zexpert", {}):
        return [*findings, *check_gpu_without_cuda(steps)]
    findings += [check_versions(steps), check_layer(steps, "cpu", "the layer on the CPU")]
    return [*findings, *check_cuda(steps)]


def check_python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("problem", f"Python is {version}, zexpert needs 3.10 or later", "use a newer Python")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        where = f"{sys.platform} on {platform.machine()}"
        return Finding("note", f"Python {version} on {where}; zexpert is tested on Linux x86-64")
    return Finding("ok", f"Python {version}, {platform.platform()}")


def check_environment() -> list[Finding]:
    """Variables that change what zexpert does."""
    findings = []
    if simulation := os.environ.get("ZEXPERT_ROUTING_SIMULATION"):
        what = f"ZEXPERT_ROUTING_SIMULATION={simulation} replaces every router by a simulation"
        findings.append(Finding("note", what, "unset it for real routing; the doctor's layers run without it"))
    capability = os.environ.get("ZEXPERT_CPU_CAPABILITY", "")
    if capability.lower() not in ("", "default", "avx2", "avx512"):
        what = f"ZEXPERT_CPU_CAPABILITY={capability} is ignored"
        findings.append(Finding("note", what, "it can be default, avx2 or avx512"))
    return findings


def check_files() -> list[Finding]:
    """Whether the binaries that an import needs are there."""
    rebuild = "install a wheel, or build in the source tree: pip install -e . --no-build-isolation"
    missing = []
    module = PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        others = ", ".join(sorted(path.name for path in PACKAGE.glob("_C.*.so")))
        built = f"; there is {others}, for another Python" if others else ""
        missing.append(Finding("problem", f"{module.name} is missing in {PACKAGE}{built}", rebuild))
    library = PACKAGE / "lib" / "libzexpert.so"
    if not library.exists():
        missing.append(Finding("problem", f"{library} is missing: this copy of zexpert is not built", rebuild))
    return missing or [Finding("ok", f"zexpert's files are in {PACKAGE}")]


def check_shadows() -> list[Finding]:
    """Whether `import zexpert` finds another package than this one, or than the one that is installed."""
    here = Path.cwd()
    imported = locate(here)
    # Without PYTHONPATH and away from this folder, Python finds what is installed, editable or not.
    installed = locate(Path(os.sep), "-E")
    if imported == PACKAGE and installed not in (None, PACKAGE):
        what = f"{PACKAGE} comes before the zexpert that is installed, {installed}"
        return [Finding("note", what, f"if that is not meant, {remedy_for_shadow(PACKAGE, here)}")]
    if imported is None or imported == PACKAGE:
        return []
    what = f"here Python imports zexpert from {imported}; this command belongs to {PACKAGE} and examines that"
    if imported == installed:
        return [Finding("note", what, "to examine the other: python -m zexpert doctor")]
    return [Finding("problem", what, remedy_for_shadow(imported, here))]


def locate(folder: Path, *options: str) -> Path | None:
    """What a Python started in `folder` imports as zexpert; None if there is nothing."""
    done = subprocess.run([sys.executable, *options, "-c", LOCATE], capture_output=True, text=True, cwd=folder)
    found = Path(done.stdout.strip()).resolve()
    return None if not done.stdout else found.parent if found.name == "__init__.py" else found


def remedy_for_shadow(shadow: Path, folder: Path) -> str:
    if shadow.parent == folder:
        return "start Python in another folder, or rename the zexpert in this one"
    return f"remove {shadow.parent} from PYTHONPATH"


def check_torch(steps: Mapping[str, Any]) -> Finding:
    found = steps.get("torch", {})
    remedy = "pip install 'torch>=2.10'"
    if "version" not in found:
        return Finding("problem", f"PyTorch cannot be imported: {failure(steps, 'torch')}", remedy)
    version = re.match(r"(\d+)\.(\d+)", found["version"])
    if version is not None and tuple(map(int, version.groups())) < OLDEST_TORCH:
        return Finding("problem", f"PyTorch is {found['version']}, zexpert needs 2.10 or later", remedy)
    cuda = f"with CUDA {found['cuda']}" if found["cuda"] else "without CUDA"
    return Finding("ok", f"PyTorch {found['version']} {cuda}")


def check_import(steps: Mapping[str, Any]) -> Finding:
    found = steps.get("zexpert", {})
    if "version" in found:
        return Finding("ok", f"zexpert {found['version']} imports, kernels for {found['cpu_capability']}")
    message = failure(steps, "zexpert")
    remedy = "build zexpert again, or install a wheel"
    if missing := re.search(r"(lib(?:torch_cuda|c10_cuda|cudart|cublas|cuda)\S*?): cannot open shared object", message):
        message = f"a CUDA library is missing, {missing[1]} ({message})"
        remedy = "install a PyTorch with CUDA, or build zexpert without: ZEXPERT_CUDA=off"
    elif "undefined symbol" in message:
        remedy = "PyTorch was replaced by another version: build zexpert again with the PyTorch that is installed"
    return Finding("problem", f"zexpert cannot be imported: {message}", remedy)


def check_versions(steps: Mapping[str, Any]) -> Finding:
    """Whether the version that pip has installed is the one that runs."""
    running = steps["zexpert"]["version"]
    try:
        installed = metadata.version("zexpert")
    except metadata.PackageNotFoundError:
        return Finding("note", f"zexpert runs from {PACKAGE} and is not installed in this environment")
    if installed != running:
        return Finding(
            "note", f"pip has zexpert {installed} installed, {running} runs from {PACKAGE}", "remove one of the two"
        )
    return Finding("ok", f"installed as {installed}, built with PyTorch {steps['zexpert']['torch_build_version']}")


def check_layer(steps: Mapping[str, Any], step: str, name: str) -> Finding:
    if step in steps and "error" not in steps[step]:
        return Finding("ok", f"{name} gives the right result")
    return Finding("problem", f"{name} fails: {failure(steps, step)}", "report this: it is a bug in zexpert")


def check_cuda(steps: Mapping[str, Any]) -> list[Finding]:
    """From GPU to kernel: driver, PyTorch, zexpert's CUDA library, code for this GPU, a right result."""
    without = check_gpu_without_cuda(steps)
    if without or steps["torch"]["cuda"] is None:
        return without or [Finding("ok", "PyTorch has no CUDA, and there is no GPU")]
    gpus = steps.get("gpus", {}).get("gpus", [])
    state, archs = steps["zexpert"]["cuda_library"], steps["zexpert"]["cuda_archs"]
    if not gpus:
        reason = steps.get("gpus", {}).get("reason") or "it sees no GPU"
        level: Literal["problem", "note"] = "problem" if nvidia_gpus() else "note"
        return [Finding(level, f"PyTorch has CUDA but cannot use a GPU: {reason}", "check nvidia-smi and the driver")]
    if state != "loaded":
        remedy = "build zexpert with CUDA: ZEXPERT_CUDA=on pip install -e . --no-build-isolation"
        return [Finding("problem", f"there is a GPU, but zexpert's CUDA library is {state}", remedy)]
    findings = []
    again = probe(range(len(gpus)))
    for index, (name, major, minor) in enumerate(gpus):
        what = f"cuda:{index}, {name}, compute capability {major}.{minor}"
        built = " ".join(archs)
        arch = "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"
        remedy = f"build zexpert for it: TORCH_CUDA_ARCH_LIST={arch} pip install -e . --no-build-isolation"
        if not has_image(archs, major, minor):
            findings.append(Finding("problem", f"no kernel image for {what}: zexpert was built for {built}", remedy))
        else:
            findings.append(check_layer(again, f"cuda:{index}", f"the layer on {what}"))
            if arch == "9.0a" and not any(one.startswith(arch) for one in archs):
                slower = f"zexpert was built for {built}; its kernels for the experts on {what} need 9.0a"
                findings.append(Finding("note", slower, remedy))
    return findings


def check_gpu_without_cuda(steps: Mapping[str, Any]) -> list[Finding]:
    if steps["torch"]["cuda"] is None and nvidia_gpus():
        what = f"this machine has an NVIDIA GPU, but PyTorch {steps['torch']['version']} has no CUDA"
        return [Finding("problem", what, "install a PyTorch with CUDA: https://pytorch.org/get-started/locally")]
    return []


def has_image(archs: list[str], major: int, minor: int) -> bool:
    """Whether code for `archs`, written as in TORCH_CUDA_ARCH_LIST, runs on a GPU of that compute capability: code for
    its own major version and no later minor one; for an "a" architecture, that one alone; PTX for any later GPU."""
    for arch in archs:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if found is None:
            continue
        built = (int(found[1]), int(found[2]))
        if built == (major, minor) or (not found[3] and built[0] == major and built[1] <= minor):
            return True
        if found[4] and not found[3] and built <= (major, minor):
            return True
    return False


def nvidia_gpus() -> list[str]:
    """Device files of NVIDIA GPUs that this process may see."""
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def probe(gpus: range = range(0)) -> dict[str, dict[str, Any]]:
    """What each step of PROBE printed. If the process died, the step that it was in has that as its error."""
    paths = [
        str(PACKAGE.parent),
        *map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))),
    ]
    command = [sys.executable, "-c", PROBE, *map(str, gpus)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("ZEXPERT_ROUTING_SIMULATION", None)
    # From a folder without Python files: the working directory comes first in sys.path.
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, cwd=os.path.abspath(os.sep)
    )
    steps: dict[str, dict[str, Any]] = {}
    begun = ""
    for line in done.stdout.splitlines():
        if line.startswith("PROBE "):
            found = json.loads(line.removeprefix("PROBE "))
            step = found.pop("step")
            if step.startswith("begin "):
                begun = step.removeprefix("begin ")
            else:
                steps[step] = found
    if done.returncode != 0 and begun not in steps:
        code = done.returncode
        died = f"the process died of {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        steps[begun] = {"error": ": ".join([died, *done.stderr.strip().splitlines()[-1:]])}
    return steps


def failure(steps: Mapping[str, Any], step: str) -> str:
    """Why a step failed, without the name of the exception."""
    message = str(steps.get(step, {}).get("error", "it did not run"))
    return re.sub(r"^(ImportError|ModuleNotFoundError|RuntimeError|OSError|ValueError): ", "", message)


def report(findings: list[Finding]) -> str:
    """The diagnosis as plain text, fit for an issue."""
    marks = {"ok": "ok      ", "note": "note    ", "problem": "PROBLEM "}
    lines = []
    for finding in findings:
        lines.append(marks[finding.level] + finding.what)
        if finding.remedy:
            lines.append(" " * 8 + "-> " + finding.remedy)
    lines += ["", *environment_lines()]
    problems = sum(finding.level == "problem" for finding in findings)
    verdict = "zexpert works here" if problems == 0 else f"{problems} problem{'s' if problems > 1 else ''}"
    return "\n".join([*lines, "", verdict])


def environment_lines() -> list[str]:
    """Versions of related packages, and environment variables that matter."""
    names = {"torch", "transformers", "vllm", "sglang", "numpy", "typer", "rich", "matplotlib"}
    versions = sorted({f"{one.name} {one.version}" for one in metadata.distributions() if one.name in names})
    lines = [f"python {sys.executable}", f"packages: {', '.join(versions) or 'none'}"]
    wanted = re.compile(r"ZEXPERT_|CUDA_HOME$|CUDA_VISIBLE_DEVICES$|LD_LIBRARY_PATH$|LD_PRELOAD$|TORCH_CUDA_ARCH_LIST$")
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if wanted.match(name)]
    if driver := shutil.which("nvidia-smi"):
        query = [driver, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        lines += [f"nvidia-smi: {line}" for line in done.stdout.splitlines()[:8]]
    return lines


def main() -> int:
    """Prints the report. 0: nothing is wrong, 1: something is."""
    findings = diagnose()
    print(report(findings))
    return 1 if any(finding.level == "problem" for finding in findings) else 0


def doctor() -> None:
    """Find and explain what keeps zexpert from working; the output is fit to paste into an issue.

    Exit code 0: nothing is wrong. 1: something is.
    """
    sys.exit(main())
