# SPDX-License-Identifier: Apache-2.0
"""The short examples run as commands and say what they promise."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zexpert_tools.checkpoint import load_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("name", [str(path.relative_to(EXAMPLES)) for path in sorted(EXAMPLES.rglob("*.py"))])
def test_help_shows_options_and_writes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(name, "--help").startswith("usage:")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_decode_loop(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    # More requests than places, and not a multiple of them: places are taken over, and empty at the end.
    out = run("decode_loop.py", "--device", device, "--requests", "7", "--places", "3", "--new-tokens", "9")
    assert re.search(r"^same bytes +yes$", out, flags=re.MULTILINE), out


@pytest.mark.parametrize("option", ["--requests", "--places", "--new-tokens", "--hidden-size"])
def test_mistakes_in_decode_loop(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "decode_loop.py"))["main"]([option, "0"])
    assert stop.value.code == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_help_of_save_layer_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "cpp_torchscript" / "save_layer.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


def test_add_drop_experts() -> None:
    out = run("add_drop_experts.py", "--steps", "150", "--target", "3")
    before, after = re.findall(r"^(?:injected|adapted) +([\d.]+) networks per token, output off by (\d+)%$", out, re.M)
    assert abs(float(after[0]) - 3.0) < 0.25
    assert int(after[1]) < 0.5 * int(before[1])


def test_train(tmp_path: Path) -> None:
    text, checkpoint = EXAMPLES.parent / "docs" / "training.md", tmp_path / "train.pt"
    arguments = ("--text", str(text), "--steps", "100", "--target", "2.5", "--out", str(checkpoint))
    out = run("train.py", *arguments)
    bits = [float(number) for number in re.findall(r"^step \d+: ([\d.]+) bits per byte", out, re.M)]
    assert len(bits) == 2
    assert bits[1] < bits[0] < 8.0
    load = re.findall(r"^layers\.\d\.moe +([\d.]+) of 4 +(\d+)% +([\d.]+) +([\d.]+)$", out, re.M)
    assert len(load) == 2
    for networks, zero_experts, imbalance, entropy in load:
        assert abs(float(networks) - 2.5) < 0.75
        assert abs(float(zero_experts) / 100 - (1 - float(networks) / 4)) < 0.01
        assert 1.0 <= float(imbalance) < 4.0
        assert 0.8 < float(entropy) <= 1.0
    written = load_model(checkpoint).generate(torch.tensor(list(b"The ")), 8, temperature=0.0)
    assert bytes(written.tolist()).startswith(b"The ")
    assert written.numel() == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "4"), "--target must be between 0 and 4, got 4.0"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--out", "/no/such/folder/train.pt"), "--out must be in a folder that exists, got /no/such/folder/train.pt"),
        (("--text", "/no/such/file"), "cannot read /no/such/file: No such file or directory"),
    ],
)
def test_mistakes_in_train(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "train.py"))["main"](list(arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_replay_choices(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    out = run("replay_choices.py", "--device", device, "--requests", "32", "--new-tokens", "40")
    differing = float(re.search(r"^tokens with other experts in the trainer +([\d.]+)%$", out, re.M)[1])
    anew, replayed = map(float, re.findall(r"^log-probabilities off, experts .* ([\d.]+)$", out, re.M))
    before, after = map(float, re.search(r"^loss before and after the step +(\S+) (\S+)$", out, re.M).groups())
    assert 0.0 < differing < 20.0
    assert replayed < 0.9 * anew
    assert after < before


@pytest.mark.parametrize("option", ["--requests", "--new-tokens"])
def test_mistakes_in_replay_choices(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "replay_choices.py"))["main"]([option, "0"])
    assert stop.value.code == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
