"""docs/cli.md names commands and options that exist; docs/integrations.md runs as shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def code_blocks(page: Path, languages: str) -> list[tuple[str, str]]:
    return re.findall(rf"^```({languages})\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "".join(text for _, text in code_blocks(DOCS / "cli.md", "sh")).splitlines()
    return [line for line in lines if line.startswith("zexpert ")]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_page_parse(line: str) -> None:
    typer = pytest.importorskip("typer")
    pytest.importorskip("rich")
    from zexpert.cli.app import app

    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)  # reads the options and runs nothing


def test_every_command_has_a_section() -> None:
    typer = pytest.importorskip("typer")
    pytest.importorskip("rich")
    from zexpert.cli.app import app

    headings = " ".join(re.findall(r"^## (.+)$", (DOCS / "cli.md").read_text(), flags=re.MULTILINE)).split()
    assert set(typer.main.get_command(app).commands) <= set(headings)


def test_the_page_on_transformers_runs_as_shown(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    blocks = code_blocks(DOCS / "integrations.md", "python|text")
    script = tmp_path / "page.py"
    script.write_text("\n".join(text for language, text in blocks if language == "python"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(text for language, text in blocks if language == "text")
