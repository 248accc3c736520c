# SPDX-License-Identifier: Apache-2.0
"""docs/cli.md names commands and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from testing import fenced_blocks

DOCS = Path(__file__).resolve().parents[2] / "docs"


def commands() -> list[str]:
    lines = "".join(fenced_blocks((DOCS / "cli.md").read_text(), "sh")).splitlines()
    return [line for line in lines if line.startswith("zexpert ")]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_page_parse(line: str) -> None:
    typer = pytest.importorskip("typer")
    pytest.importorskip("rich")
    from zexpert_tools.cli.app import app

    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)  # reads the options and runs nothing


def test_every_command_has_a_section() -> None:
    typer = pytest.importorskip("typer")
    pytest.importorskip("rich")
    from zexpert_tools.cli.app import app

    headings = " ".join(re.findall(r"^## (.+)$", (DOCS / "cli.md").read_text(), flags=re.MULTILINE)).split()
    assert set(typer.main.get_command(app).commands) <= set(headings)
