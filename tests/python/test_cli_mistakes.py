# SPDX-License-Identifier: Apache-2.0
"""Whatever a user gives the `zexpert` command, an error is one sentence, and no work is lost."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import typer
from typer.testing import CliRunner

from test_cli import ENVIRONMENT
from zexpert_tools import checkpoint as checkpoints
from zexpert_tools import command as zexpert_command
from zexpert_tools import files
from zexpert_tools.benchmark import layer, rates, torch_routing
from zexpert_tools.byte_decoder import ByteDecoder, ByteDecoderConfig
from zexpert_tools.cli import bench, demo
from zexpert_tools.cli.app import app
from zexpert_tools.trainer import Trainer, TrainerConfig

TINY = ByteDecoderConfig(
    hidden_size=16, num_layers=2, num_heads=2, context_length=32, num_experts=6, zero_expert_num=3, top_k=5,
    intermediate_size=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small models, an own folder, and results that are not shown: what is accepted ends soon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ByteDecoderConfig", lambda: TINY)
    monkeypatch.setattr(demo, "time_layer", lambda *_: None)
    monkeypatch.setattr(rates, "last_level_cache_bytes", lambda: 1 << 12)
    monkeypatch.setattr(rates, "measure_limits", lambda device, dtype: rates.Limits(1e9, 1e9))
    tiny = layer.Shape(torch_routing.RoutingCase("tiny", 8, 4, 0, 3, has_bias=True), 32, 16)
    monkeypatch.setitem(layer.MODELS, "small", tiny)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat.\n" * 200)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a trainer that has done two steps."""
    torch.manual_seed(0)
    trainer = Trainer(ByteDecoder(TINY), torch.randint(256, (2000,), dtype=torch.uint8), TrainerConfig(batch_size=2))
    trainer.train_step()
    trainer.train_step()
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(trainer, path)
    return path


#: What Python's and PyTorch's own errors say.
INTERNAL = re.compile(r"[A-Z]\w+Error|__\w+__|NoneType|object has|object is not|positional|keyword argument|aten::")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def assert_one_sentence(result: Any, message: str = "") -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not INTERNAL.search(result.stderr), result.stderr


# ---- Work is not lost -----------------------------------------------------------------------------------------------


def test_a_demo_replaces_a_checkpoint_only_if_asked(text: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(checkpoint, out / "checkpoint.pt")
    before = (out / "checkpoint.pt").read_bytes()
    new = ("demo", "--text", text, "--steps", 3, "--out", out, "--generate-bytes", 0)
    for others in ((), ("--resume", checkpoint)):
        assert_one_sentence(run(*new, *others), "out/checkpoint.pt is there already: --resume")
        assert (out / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt"]
    assert run(*new, "--resume", out / "checkpoint.pt").exit_code == 0  # its own continuation
    assert run(*new, "--overwrite").exit_code == 0
    assert len(checkpoints.load_checkpoint(out / "checkpoint.pt")["history"]) == 3


@pytest.mark.parametrize("moment", ["before the training", "while the checkpoint is written"])
def test_a_full_disk(
    moment: str, text: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(checkpoint, out / "checkpoint.pt")
    before = (out / "checkpoint.pt").read_bytes()

    steps: list[object] = []
    if moment == "before the training":
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))  # type: ignore[attr-defined]
        monkeypatch.setattr(Trainer, "train_step", steps.append)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if moment != "before the training":
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, unlimited[1]))  # stops within the checkpoint
    try:
        result = run("demo", "--text", text, "--steps", 3, "--out", out, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_one_sentence(result, "MiB free" if moment == "before the training" else "checkpoint.pt: File too large")
    assert steps == []
    assert (out / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt"]


def test_the_folder_is_tried_before_the_training(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    monkeypatch.setattr(Trainer, "train_step", steps.append)
    assert_one_sentence(run("demo", "--text", text, "--out", "/proc/zexpert"), "/proc/zexpert")
    assert steps == []


def test_a_folder_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert_one_sentence(run("bench", "routing", "--plot", "loop/a.png"), "--plot must be in a folder that exists")


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), files.whole_file(path) as partial:
        partial.write_bytes(b"half")
        raise OSError("full")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---- Checkpoints that do not fit ------------------------------------------------------------------------------------


def without_a_weight(state: dict[str, Any]) -> None:
    del state["model"]["norm.weight"]


def with_an_unknown_weight(state: dict[str, Any]) -> None:
    state["model"]["more"] = torch.zeros(1)


def with_another_size(state: dict[str, Any]) -> None:
    state["model"]["embedding.weight"] = torch.zeros(256, 8)


def with_a_nan(state: dict[str, Any]) -> None:
    state["model"]["norm.weight"][3] = torch.nan


def with_text_for_weights(state: dict[str, Any]) -> None:
    state["model"] = "weights"


def configured(**sizes: object) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["model_config"] |= sizes

    change.__name__ = str(sizes)
    return change


def with_weights(change: Callable[[torch.Tensor], object]) -> Callable[[dict[str, Any]], None]:
    def change_all(state: dict[str, Any]) -> None:
        state["model"] = {name: change(weight) for name, weight in state["model"].items()}

    change_all.__name__ = getattr(change, "__name__", "weights")
    return change_all


MODEL_FAULTS = [
    without_a_weight,
    with_an_unknown_weight,
    with_another_size,
    with_a_nan,
    with_text_for_weights,
    configured(num_heads=0),
    configured(num_heads=3),
    configured(num_layers=10**9),
    configured(hidden_size=10**12),
    configured(hidden_size="16"),
    configured(context_length=10**12),
    configured(top_k=99),
    configured(routed_scaling_factor=float("nan")),
    configured(unknown=1),
    configured(hidden_size=10**30),
    *(configured(top_k=value) for value in (None, [5], {}, 2.5, True, -1, float("nan"), "\u00e9", torch.zeros(2))),
    *(configured(routed_scaling_factor=value) for value in (None, "4", [4.0], torch.ones(1))),
    *(with_weights(change) for change in (torch.Tensor.long, torch.Tensor.bool, torch.Tensor.tolist, str)),
    *(with_weights(change) for change in (torch.Tensor.to_sparse, torch.Tensor.cfloat, torch.sum)),
    with_weights(lambda weight: weight.to(torch.float8_e4m3fn)),
    with_weights(lambda weight: weight.to("meta")),
    lambda state: state["model"].update({3: torch.zeros(1)}),
    lambda state: state.update(model={1: 2}),
    lambda state: state.update(model_config={1: 2}),
    lambda state: state.update(model_config=torch.zeros(2)),
    lambda state: state.pop("model"),
    lambda state: state.update(model_config=None),
]


@pytest.mark.parametrize("fault", MODEL_FAULTS, ids=lambda fault: fault.__name__)
def test_a_model_that_does_not_fit(
    fault: Callable[[dict[str, Any]], object], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    fault(state)
    torch.save(state, checkpoint)
    for arguments in (
        ("generate", "--length", 1, "--checkpoint", checkpoint),
        ("profile", checkpoint, "--text", text),
        ("demo", "--text", text, "--resume", checkpoint, "--out", tmp_path / "out"),
    ):
        assert_one_sentence(run(*arguments), "checkpoint.pt is not a checkpoint of a byte decoder: ")
    assert not (tmp_path / "out").exists()


def without_an_optimizer_group(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"].pop()


def with_another_moment(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    "fault",
    [
        without_an_optimizer_group,
        with_another_moment,
        lambda state: state.update(optimizer=[]),
        lambda state: state.update(generator=torch.zeros(3)),
        lambda state: state.update(history=[{"step": 1}]),
        lambda state: state.update(history=[{"loss": "low"}]),
        lambda state: state.update(history={}),
        lambda state: state["history"][0].update(bits_per_byte=None),
        lambda state: state["history"][1].update(held_out_bits_per_byte="low"),
        lambda state: state.update(optimizer=None),
        lambda state: state["optimizer"].update(state=3),
        lambda state: state["optimizer"]["state"].pop(0),
        lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan),
        lambda state: state["optimizer"]["param_groups"][0].pop("eps"),
        lambda state: state["optimizer"]["param_groups"][0].update(betas=None),
        lambda state: state["optimizer"]["param_groups"][0].update(weight_decay="x"),
        lambda state: state["generator"].zero_(),
        lambda state: state.update(generator="x"),
        lambda state: state.pop("history"),
    ],
)
def test_a_trainer_that_cannot_continue(
    fault: Callable[[dict[str, Any]], object], checkpoint: Path, text: Path
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    fault(state)
    torch.save(state, checkpoint)
    result = run("demo", "--text", text, "--resume", checkpoint, "--out", "out", "--steps", 9)
    assert_one_sentence(result, "checkpoint.pt is not a checkpoint of a byte decoder: ")


def test_what_is_no_checkpoint_at_all(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no checkpoint")
    torch.save([1], tmp_path / "list")
    for name, reason in (("text", "PyTorch cannot read it"), ("list", "it holds a list"), (".", "it is not a file")):
        assert_one_sentence(
            run("generate", "--checkpoint", name), f"{name} is not a checkpoint of a byte decoder: {reason}"
        )
    assert_one_sentence(run("generate", "--checkpoint", "gone"), "cannot read checkpoint gone: No such file")


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_the_smallest_temperatures_pick_the_likeliest_byte(temperature: float, checkpoint: Path) -> None:
    model = checkpoints.load_model(checkpoint)
    prompt = torch.tensor(list(b"The "), dtype=torch.uint8)
    assert torch.equal(model.generate(prompt, 8, temperature=temperature), model.generate(prompt, 8, temperature=0.0))


def test_a_prompt_may_hold_any_bytes(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "zexpert_tools", "generate", "--length", "1"]
    command += ["--checkpoint", str(checkpoint), "--prompt"]
    done = subprocess.run([*map(os.fsencode, command), b"a\xff"], capture_output=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"after a prompt of 2 bytes" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--checkpoint", "x", "--device", "cpu:7"), "--device must be"),
        (("generate", "--checkpoint", "x", "--temperature", "nan"), "--temperature"),
        (("generate", "--checkpoint", "x", "--temperature", "inf"), "--temperature must be finite, got inf"),
        (("generate", "--checkpoint", "x", "--length", "9" * 30), "--length must be below 2^63, got 999"),
        (("bench", "--tokens", "9" * 20), "--tokens must be below 2^63, got 99999999999999999999"),
        (("bench", "--tokens", "9999999999999"), "out of memory: try fewer tokens or a smaller model"),
        (("plan", "--gpus", "9" * 20), "--gpus must be below 2^63"),
        (("plan", "--network", "inf"), "--network must be finite, got inf"),
        (("bench", "routing", "--plot", "/proc/a.png"), "cannot write to /proc: No such file or directory"),
        (("profile", "gone"), "profile accepts checkpoints of zexpert demo and folders with a LongCat-Flash"),
    ],
)
def test_values_out_of_range(arguments: tuple[str, ...], message: str) -> None:
    assert_one_sentence(run(*arguments), message)


OPTIONS = [
    (name, option.opts[0] if option.param_type_name == "option" else "")
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    for option in command.params
    if not getattr(option, "is_flag", False)
]
JUNK = ["", "nan", "-inf", "-1", "1.5", "9" * 25, "/no/such/place", "[/bold]", "a\nb", "\u00e9\U0001f642", os.devnull]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_no_value_of_any_option_is_answered_with_a_traceback(
    command: str, option: str, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    usual: dict[str, dict[str, object]] = {
        "demo": {"--text": text, "--steps": 1, "--generate-bytes": 1},
        "generate": {"--checkpoint": checkpoint, "--length": 1},
        "bench": {"": "routing", "--tokens": 1, "--repeats": 1},
        "profile": {"": checkpoint, "--text": text, "--max-tokens": 20},
        "plan": {"--gpus": 8, "--tokens": 16},
    }
    for number, value in enumerate(JUNK):
        given = {**usual.get(command, {}), option: value}
        if command == "demo" and option != "--out":
            given["--out"] = tmp_path / str(number)
        arguments = [part for name, one in given.items() for part in (name, one) if part is not name or name]
        result = run(command, *arguments)
        assert result.exit_code in (0, 2), (arguments, result.output, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit)


# ---- The mechanism --------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("zexpert_tools.cli.demo", "zexpert_tools.pictures"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("generate", "--checkpoint", checkpoint)
    assert_one_sentence(result, "error: this needs matplotlib: pip install 'zexpert[cli]'")


def test_a_bug_is_told_from_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(bench, "measure", measure)
    result = run("bench")
    assert result.exit_code == 1
    assert "this is a bug in zexpert: KeyError: 'gone' (ZEXPERT_TRACEBACK=1 prints where)" in result.stderr
    monkeypatch.setenv("ZEXPERT_TRACEBACK", "1")
    assert isinstance(run("bench").exception, KeyError)


@pytest.mark.parametrize("arguments", [["info", "--json"], ["doctor"], ["--help"]], ids=" ".join)
def test_output_that_cannot_be_written(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "zexpert_tools", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=300)
    assert done.returncode in (1, 2)
    assert done.stderr.decode().count("\n") == 1
    assert "No space left on device" in done.stderr.decode()


@pytest.mark.parametrize(
    ("command", "busy", "given", "expected"),
    [
        ("info", True, {}, "PASSIVE"),
        ("info", False, {}, "None"),
        ("bench", True, {}, "None"),
        ("info", True, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
    ],
)
def test_how_threads_wait_is_chosen_before_pytorch_is_loaded(
    command: str, busy: bool, given: dict[str, str], expected: str
) -> None:
    script = (
        "import sys, os, zexpert_tools.command as command; assert 'torch' not in sys.modules\n"
        f"command.is_busy = lambda: {busy}\n"
        "try: command.main()\n"
        "except SystemExit: print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_WAIT_POLICY"} | given
    arguments = [sys.executable, "-c", script, command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.splitlines()[-1] == expected, done.stderr


@pytest.mark.parametrize(("running", "busy"), [("1", False), ("3", True)])
def test_a_machine_is_busy_if_others_run(running: str, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: f"0.5 0.6 0.7 {running}/345 6789\n")
    assert zexpert_command.is_busy() is busy


def test_no_folder_is_left_where_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="MiB free"):
        files.prepare_folder(tmp_path / "new", 1 << 20)
    assert not (tmp_path / "new").exists()
