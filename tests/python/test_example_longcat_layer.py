# SPDX-License-Identifier: Apache-2.0
"""The example runs on small settings, and says in one sentence what is wrong with what it was given."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "longcat_layer.py"
SMALL = ["--tokens", "40", "--hidden-size", "16", "--repeats", "1", "--threads", "1"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import longcat_layer as example

    threads = torch.get_num_threads()
    yield example
    torch.set_num_threads(threads)


def test_runs_as_a_command_and_piped() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), *SMALL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.isascii()
    for name in ("max error, zexpert", "FFN slots per token", "zero slots per token", "speed-up"):
        assert re.search(rf"^{name} +\S", done.stdout, flags=re.MULTILINE), f"no line for {name}:\n{done.stdout}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_agrees_with_the_reference_on_a_users_text(
    example: ModuleType, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question.")
    assert example.main([*SMALL, "--text", str(text), "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    assert "13 words" in out
    assert re.search(r"^agreement +yes", out, flags=re.MULTILINE)


def test_histogram_counts_every_token(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(SMALL) == 0
    bars = re.findall(r"^ +(\d+) zero slots +(\d+) tokens", capsys.readouterr().out, flags=re.MULTILINE)
    assert sum(int(tokens) for _, tokens in bars) == 40
    assert all(0 <= int(slots) <= 12 for slots, _ in bars)


def test_hidden_states_depend_on_the_text_alone(example: ModuleType) -> None:
    words = example.split_words("One fish, two fish.")
    assert words == ["one", "fish", ",", "two", "fish", "."]
    torch.manual_seed(1)
    first = example.embed(words, 16)
    torch.manual_seed(2)
    assert torch.equal(first, example.embed(words, 16))
    assert not torch.equal(first[1], first[4]), "the same word after another word has another state"
    torch.testing.assert_close(first.square().mean(dim=1), torch.ones(6))


@pytest.mark.parametrize("content", ["", "  \n\t"], ids=["empty", "blank"])
def test_text_without_words(
    example: ModuleType, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(content)
    assert example.main([*SMALL, "--text", str(text)]) == 2
    assert capsys.readouterr().err == f"longcat_layer.py: --text {text} has no words in it\n"


def test_bytes_that_are_not_text_still_run(example: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "bytes"
    text.write_bytes(bytes(range(256)))
    assert example.main([*SMALL, "--text", str(text)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no/such/file"], "cannot read --text no/such/file: No such file or directory"),
        (["--text", "."], "cannot read --text .: Is a directory"),
        (["--tokens", "0"], "--tokens must be at least 1 and below 2^63, got 0"),
        (["--hidden-size", "1"], "--hidden-size must be at least 2 and below 2^63, got 1"),
        (["--threads", "-1"], "--threads must be at least 1 and below 2^63, got -1"),
        (["--seed", "-1"], "--seed must be at least 0 and below 2^63, got -1"),
    ],
)
def test_mistakes_get_one_sentence(
    example: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main([*SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"longcat_layer.py: {message}\n"
    assert captured.out == ""


def test_weights_larger_than_memory_are_refused(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([*SMALL, "--hidden-size", "1000000"]) == 2
    assert re.fullmatch(
        r"longcat_layer.py: --hidden-size 1000000 needs .* GB for weights, .* has .* GB\n", capsys.readouterr().err
    )
