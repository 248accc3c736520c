# SPDX-License-Identifier: Apache-2.0
"""The pages of docs: the python blocks of each run as one program and print its text blocks (py blocks are not run),
and the faults that troubleshooting.md explains are raised with the messages it shows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zexpert
from testing import fenced_blocks
from zexpert.models import LongcatFlashConfig, LongcatFlashMoE

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Pages whose programs run elsewhere.
RUN_ELSEWHERE = {
    "distributed.md": "test_distributed_docs.py runs it under torchrun",
    "embedding.md": "tests/cpp/embedding compiles and runs it, its C++ included",
}

# What a page's program needs beside zexpert.
NEEDED = {"integrations.md": "transformers"}


PROGRAMS = [page for page in sorted(DOCS.rglob("*.md")) if fenced_blocks(page.read_text(), "python")]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: str(page.relative_to(DOCS)))
def test_blocks_run_as_one_program(page: Path, tmp_path: Path) -> None:
    name = str(page.relative_to(DOCS))
    if name in RUN_ELSEWHERE:
        pytest.skip(RUN_ELSEWHERE[name])
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    shown = fenced_blocks(page.read_text(), "text")
    script = tmp_path / "page.py"
    script.write_text("\n".join(fenced_blocks(page.read_text(), "python")))
    # Their products are too small to share among threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    if shown:
        assert done.stdout == "".join(shown)


def test_navigation_has_every_page() -> None:
    """mkdocs warns of a page that the navigation leaves out; `make docs` is not in every test run."""
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert named - {"index.md", "contributing.md", "changelog.md", "api.md"} == pages


def test_api_page_has_every_public_class_and_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import api_page

    modules = (zexpert, zexpert.ops, zexpert.router, zexpert.runner, zexpert.models, zexpert.training)
    public = {name for module in modules for name in module.__all__ if callable(getattr(module, name))}
    headings = re.findall(r"^### (\w+)$", api_page.page(), flags=re.MULTILINE)
    assert public <= set(headings)
    assert len(headings) == len(set(headings))


SIZES = {"num_experts": 16, "top_k": 4, "hidden_size": 64, "intermediate_size": 32}
ZERO_EXPERTS = {"zero_expert_type": "identity", "zero_expert_num": 8}


def layer(**arguments: object) -> zexpert.FusedMoE:
    return zexpert.FusedMoE(**SIZES, **ZERO_EXPERTS, **arguments)  # type: ignore[arg-type]


def not_built(folder: Path) -> None:
    """Imports a copy of the package without its compiled parts."""
    package = Path(zexpert.__file__).parent
    shutil.copytree(package, folder / "zexpert", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-c", "import zexpert"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, env=environment)
    assert done.returncode == 1
    raise ImportError(done.stderr.strip().splitlines()[-1])


def no_kernel_for_the_device(_: Path) -> None:
    """PyTorch's own message for a device without a kernel; here a kind of tensor that no build of zexpert supports."""
    try:
        torch.ops.zexpert.moe_plan(torch.eye(2, dtype=torch.int32).to_sparse(), 2)
    except RuntimeError as error:
        raise RuntimeError(str(error).replace("SparseCPU", "CUDA")) from error


def logits_of_real_experts(_: Path) -> None:
    layer()(torch.zeros(5, 64), torch.zeros(5, 16))


def bias_of_real_experts(_: Path) -> None:
    layer(e_score_correction_bias=torch.zeros(16))


def other_dtype(_: Path) -> None:
    layer()(torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(5, 24))


def bias_elsewhere(_: Path) -> None:
    router = zexpert.create_fused_moe_router(
        4,
        16,
        num_logical_experts=16,
        zero_expert_type="identity",
        zero_expert_num=8,
        e_score_correction_bias=torch.zeros(24, device="meta"),
    )
    router.select_experts(torch.zeros(5, 64), torch.zeros(5, 24))


def ids_of_zero_experts(_: Path) -> None:
    zexpert.ops.moe_plan(torch.tensor([[3, 17]]), 16)


def bias_in_low_precision(_: Path) -> None:
    model = layer(e_score_correction_bias=torch.zeros(24)).to(torch.bfloat16)
    zexpert.telemetry.track_routing(model)
    model(torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(5, 24))
    zexpert.training.LongCatBiasController(update_rate=0.1, target_ffn_experts=2.0).update(model)


def other_sizes(_: Path) -> None:
    config = LongcatFlashConfig(
        hidden_size=64, expert_ffn_hidden_size=32, n_routed_experts=16, zero_expert_num=8, moe_topk=4
    )
    LongcatFlashMoE.from_state_dict(config, {"router.classifier.weight": torch.zeros(12, 64)})


def no_room(folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        moe = layer(expert_parallel_group=dist.group.WORLD)
        moe.runner.use_exchange("fixed", max_tokens=8, capacity=1)
        with torch.inference_mode():
            moe(torch.zeros(5, 64), torch.zeros(5, 24))
        moe.runner.check_overflow()
    finally:
        dist.destroy_process_group()


#: What raises the message under each heading of troubleshooting.md.
FAULTS: dict[str, tuple[Callable[[Path], None], type[Exception]]] = {
    "zexpert is not built": (not_built, ImportError),
    "An operator has no kernel for the GPU": (no_kernel_for_the_device, RuntimeError),
    "Logits without columns for zero experts": (logits_of_real_experts, ValueError),
    "A selection bias of the wrong length": (bias_of_real_experts, ValueError),
    "Hidden states of another dtype": (other_dtype, ValueError),
    "A bias on another device": (bias_elsewhere, ValueError),
    "Ids of zero experts in a plan": (ids_of_zero_experts, RuntimeError),
    "A selection bias in low precision": (bias_in_low_precision, ValueError),
    "A checkpoint of another size": (other_sizes, RuntimeError),
    "An exchange without room": (no_room, RuntimeError),
}


def faults_of_the_page() -> dict[str, str]:
    """The message under each heading that has one: the line right below it, in backticks."""
    page = (DOCS / "troubleshooting.md").read_text()
    return dict(re.findall(r"^## (.+)\n\n`([^`\n]+)`\n", page, flags=re.MULTILINE))


def test_troubleshooting_explains_the_faults_below() -> None:
    assert list(faults_of_the_page()) == list(FAULTS)


@pytest.mark.parametrize("heading", FAULTS)
def test_fault_is_raised_as_shown(heading: str, tmp_path: Path) -> None:
    fault, kind = FAULTS[heading]
    with pytest.raises(kind) as raised:
        fault(tmp_path)
    pattern = ".*".join(re.escape(part) for part in faults_of_the_page()[heading].split("…"))
    assert re.fullmatch(pattern, str(raised.value), flags=re.DOTALL)
