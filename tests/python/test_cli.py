# SPDX-License-Identifier: Apache-2.0
"""The `zexpert` command, run as a user would."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

# One thread: on a busy machine two wait for each other in every small operator.
ENVIRONMENT = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def zexpert(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zexpert_tools", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, timeout=300)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory) -> Path:
    """A finished demo of a few steps; its printed story is in story.txt."""
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text.txt"
    text.write_text("".join(f"Line {number}: the cat sat on mat {number % 7}.\n" for number in range(400)))
    result = zexpert("demo", "--text", text, "--steps", 3, "--out", folder / "out", "--generate-bytes", 20)
    assert result.returncode == 0, result.stderr
    (folder / "story.txt").write_text(result.stdout)
    return folder


def test_demo_tells_the_story_and_saves_the_files(demo_folder: Path) -> None:
    story = (demo_folder / "story.txt").read_text()
    assert "brighter" not in story  # there are no colours in a pipe
    for part in (
        "bits per byte",
        "feed-forward experts per byte",
        "target 4.00",
        "plain PyTorch",
        "after a prompt of 64 bytes",
    ):
        assert part in story
    for name in ("compute_map.png", "training.png"):
        data = (demo_folder / "out" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    assert (demo_folder / "out" / "checkpoint.pt").exists()


def test_the_titles_of_the_training_curves_are_not_clipped(tmp_path: Path, monkeypatch) -> None:
    from zexpert_tools import pictures
    from zexpert_tools.trainer import StepRecord

    figures = []
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    pictures.save_training_curves(tmp_path / "training.png", [StepRecord(1, 8.0, 4.0, 8.0)], top_k=6, target=4.0)
    (figure,) = figures
    for axis in figure.axes:
        title = axis.title.get_window_extent()
        assert title.x0 >= 0
        assert title.x1 <= figure.bbox.x1
    monkeypatch.undo()
    pictures.plt.close(figure)


def test_generate_colours_more_than_a_window(demo_folder: Path) -> None:
    checkpoint = demo_folder / "out" / "checkpoint.pt"
    arguments = ("--checkpoint", checkpoint, "--prompt", "Line " * 52, "--length", 2, "--temperature", 0)
    result = zexpert("generate", *arguments)
    assert result.returncode == 0, result.stderr
    assert "after a prompt of 260 bytes" in result.stdout
    assert result.stdout.count("Line") >= 50


def test_generate_reloads_the_checkpoint(demo_folder: Path) -> None:
    checkpoint = demo_folder / "out" / "checkpoint.pt"
    runs = [zexpert("generate", "--checkpoint", checkpoint, "--prompt", "Line", "--length", 8) for _ in range(2)]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert "Line" in runs[0].stdout


def test_demo_goes_on_from_a_checkpoint(demo_folder: Path) -> None:
    result = zexpert(
        *("demo", "--text", demo_folder / "text.txt", "--out", demo_folder / "resumed", "--generate-bytes", 0),
        *("--resume", demo_folder / "out" / "checkpoint.pt", "--steps", 4),
    )
    assert result.returncode == 0, result.stderr
    assert "After 4 steps" in result.stdout
    done = zexpert(
        *("demo", "--text", demo_folder / "text.txt", "--out", demo_folder / "again"),
        *("--resume", demo_folder / "out" / "checkpoint.pt", "--steps", 3),
    )
    assert done.returncode == 2
    assert "--steps must be above the 3 steps" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_saves_what_it_has(number: signal.Signals, demo_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zexpert_tools", "demo", "--text", str(demo_folder / "text.txt")]
    command += ["--steps", "100000", "--out", str(tmp_path / "out"), "--generate-bytes", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        shown = ""
        while "step 25:" not in shown:
            line = process.stdout.readline()
            assert line, shown
            shown += line
        process.send_signal(number)
        rest, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0
    assert re.search(r"Interrupted at step \d+ of 100000", rest)
    assert "--resume" in rest
    assert f"--text {demo_folder / 'text.txt'} --out {tmp_path / 'out'}" in rest
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    assert time.time() - (tmp_path / "out" / "checkpoint.pt").stat().st_mtime < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--text", "/no/such/file"), "cannot read /no/such/file: No such file or directory"),
        (("demo", "--text", os.devnull), "the text must be at least 4096 bytes long"),
        (("demo", "--device", "abacus"), "--device must be"),
        (("demo", "--device", "meta"), '--device must be "auto" or a device such as "cpu" or "cuda:0", got "meta"'),
        (("demo", "--out", __file__), "is a file"),
        (("demo", "--seed", "9" * 30), "Invalid value for '--seed'"),
        (("demo", "--out", f"{__file__}/below"), f"{__file__}/below: Not a directory"),
        (("generate", "--checkpoint", "/no/such/file"), "cannot read checkpoint /no/such/file"),
        (("generate", "--checkpoint", __file__), "is not a checkpoint of a byte decoder"),
        (("generate", "--checkpoint", __file__, "--prompt", ""), "--prompt must hold at least one byte"),
    ],
)
def test_a_users_mistake_is_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    result = zexpert(*arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_help_lists_the_commands() -> None:
    result = zexpert("--help")
    assert result.returncode == 0
    for command in ("demo", "generate", "info", "doctor", "bench", "profile"):
        assert f" {command} " in result.stdout
