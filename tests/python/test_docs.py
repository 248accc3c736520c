# SPDX-License-Identifier: Apache-2.0
"""The pages of docs: the python blocks of each run as one program and print its text blocks (py blocks are not run),
and troubleshooting.md has every error message.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testing import fenced_blocks
from zexpert import ops

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


def test_every_operator_has_a_page() -> None:
    operators = {name for name in ops.__all__ if name.islower()}
    pages = {page.stem for page in (DOCS / "ops").glob("*.md")}
    assert pages == operators - {"grouped_mlp_with_gate_up"}  # that one is on the page of grouped_mlp


def merged(parts: list[str]) -> str:
    """A message as the page shows it, with … for what differs from call to call."""
    return re.sub(r"…+", "…", "".join(parts)).replace('"…"', "…").strip()


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return "…"


def messages_in_python(path: Path) -> set[str]:
    """Of `raise Kind(message)`."""
    raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    return {merged([text_of(call.args[0])]) for call in raised if isinstance(call, ast.Call) and call.args}


def messages_in_cpp(path: Path) -> set[str]:
    """Of ZEXPERT_CHECK(condition, parts...) and throw_error(parts...)."""
    found = set()
    literal = r'"(?:\\.|[^"\\])*"'
    for macro, body in re.findall(
        rf"\b(ZEXPERT_CHECK|throw_error)\(((?:[^;\"]|{literal})*?)\);", path.read_text(), flags=re.DOTALL
    ):
        arguments, depth = [""], 0
        for token in re.findall(rf"{literal}|.", body, flags=re.DOTALL):
            depth += (token in "([{") - (token in ")]}")
            if token == "," and depth == 0:
                arguments.append("")
            else:
                arguments[-1] += token
        parts = []
        for argument in arguments[macro == "ZEXPERT_CHECK" :]:
            is_text = re.fullmatch(rf"\s*({literal}\s*)+", argument)
            pieces = re.findall(r'"((?:\\.|[^"\\])*)"', argument)
            parts.append("".join(pieces).replace('\\"', '"') if is_text else "…")
        found.add(merged(parts))
    return found


def test_every_error_message_is_explained() -> None:
    """docs/troubleshooting.md has each message in backticks, and no other; those of loading are in docs/install.md."""
    package, sources = ROOT / "python" / "zexpert", ROOT / "csrc"
    messages: set[str] = set()
    for path in package.rglob("*.py"):
        if path.name != "_loader.py":
            messages |= messages_in_python(path)
    for path in sources.rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            messages |= messages_in_cpp(path)
    assert len(messages) > 100
    explained = set(re.findall(r"`([^`\n]+)`", (DOCS / "troubleshooting.md").read_text()))
    missing = sorted(messages - explained - {"…"})
    assert not missing, "docs/troubleshooting.md lacks\n" + "\n".join(f"- `{message}`" for message in missing)
    gone = sorted(message for message in explained - messages - {"…"} if "…" in message)
    assert not gone, f"docs/troubleshooting.md has messages that no code has: {gone}"
