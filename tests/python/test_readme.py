# SPDX-License-Identifier: Apache-2.0
"""The documentation says what is true: its example runs as shown, its links lead somewhere, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from testing import FENCED_BLOCK, fenced_blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])


def without_code(text: str) -> str:
    """Markdown without fenced blocks and inline code, where brackets are not links and '#' is not a heading."""
    return re.sub(r"`[^`\n]*`", "", FENCED_BLOCK.sub("", text))


def anchors(text: str) -> set[str]:
    """The names GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCED_BLOCK.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_example_runs_as_shown(tmp_path: Path) -> None:
    blocks = fenced_blocks((ROOT / "README.md").read_text(), "python")
    assert blocks, "README.md has no python example"
    script = tmp_path / "example.py"
    script.write_text(blocks[0])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^print\(.*\)  # (.+)$", blocks[0], flags=re.MULTILINE)
    assert shown, "the example shows no output"
    assert done.stdout.splitlines() == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        destination = (page.parent / path).resolve() if path else page
        missing_anchor = anchor and destination.suffix == ".md" and anchor not in anchors(destination.read_text())
        if not destination.exists() or missing_anchor:
            broken.append(target)
    assert not broken, f"{page.name} links to what does not exist: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(), flags=re.MULTILINE))
    assert named <= targets, f"{page.name} names make targets that do not exist: {sorted(named - targets)}"
