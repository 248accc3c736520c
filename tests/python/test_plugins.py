# SPDX-License-Identifier: Apache-2.0
"""The entry points that serving engines call: off, on and nonsense in the environment, without an engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from zexpert_plugins import is_on

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("value", ["1", "true", "True", "YES", "on"])
def test_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEXPERT_VLLM", value)
    assert is_on("ZEXPERT_VLLM")


@pytest.mark.parametrize("value", ["", "0", "false", "No", "OFF"])
def test_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEXPERT_VLLM", value)
    assert not is_on("ZEXPERT_VLLM")
    monkeypatch.delenv("ZEXPERT_VLLM")
    assert not is_on("ZEXPERT_VLLM")


@pytest.mark.parametrize("value", ["2", "yes please", " 1", "none"])
def test_nonsense(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEXPERT_VLLM", value)
    message = f"^ZEXPERT_VLLM must be 1, true, yes or on, or 0, false, no or off, got {value!r}$"
    with pytest.raises(ValueError, match=message):
        is_on("ZEXPERT_VLLM")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_process_that_does_not_want_zexpert_imports_nothing_of_it(engine: str) -> None:
    code = (
        f"import sys, zexpert_plugins; zexpert_plugins.{engine}()\n"
        "print([name for name in ('zexpert', 'torch', 'vllm', 'sglang') if name in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZEXPERT_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


def test_entry_points_name_functions_that_exist() -> None:
    groups = re.findall(r'entry-points\."(.*)"\]\nzexpert = "(.*):(.*)"', (ROOT / "pyproject.toml").read_text())
    assert [group for group, _, _ in groups] == ["vllm.general_plugins", "sglang.srt.plugins"]
    for _, module, function in groups:
        assert callable(getattr(import_module(module), function))
