# SPDX-License-Identifier: Apache-2.0
"""`zexpert info`, `doctor`, `bench` and `profile`, run as a user would, and the parts that need another machine."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zexpert as package
import zexpert_tools

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console
from typer.testing import CliRunner

from test_cli import ENVIRONMENT, zexpert
from zexpert._loader import CUDA_LIBRARY
from zexpert_tools import pictures
from zexpert_tools.benchmark import layer, rates, torch_routing
from zexpert_tools.byte_decoder import ByteDecoder, ByteDecoderConfig
from zexpert_tools.checkpoint import save_checkpoint
from zexpert_tools.cli import bench, doctor, terminal
from zexpert_tools.cli.app import app
from zexpert_tools.trainer import Trainer, TrainerConfig

PACKAGE = Path(package.__file__).parent
PNG = b"\x89PNG"


# ---- info -----------------------------------------------------------------------------------------------------------


def test_info_as_json() -> None:
    result = zexpert("info", "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["zexpert"] == package.build_info()
    assert told["torch"]["version"] == torch.__version__
    assert told["devices"][0]["capability"] == package.build_info()["cpu_capability"]
    assert len(told["devices"]) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    operators = told["operators"]
    assert operators["biased_topk"] == {
        "cpu": True,
        "cuda": told["zexpert"]["cuda_library"] == "loaded",
        "backward": True,
    }
    assert operators["moe_plan"]["backward"] is False
    assert operators["grouped_mlp"]["cuda"] is False
    assert operators["grouped_mlp_hopper"] == {
        "cpu": False,
        "cuda": operators["biased_topk"]["cuda"],
        "backward": False,
    }
    assert sorted(operators) == sorted(name for name in package.ops.__all__ if name.islower())


def test_info_in_tables() -> None:
    result = zexpert("info")
    assert result.returncode == 0, result.stderr
    for part in (package.__version__, str(torch.__version__), "biased_topk", "moe_finalize", "AVX" if "AVX" in
                 package.build_info()["cpu_capability"] else "DEFAULT"):  # fmt: skip
        assert part in result.stdout
    assert "\x1b" not in result.stdout


# ---- doctor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy_of_the_package(tmp_path: Path) -> Path:
    """The package and its command in a folder of their own, to be broken."""
    for folder in (PACKAGE, Path(zexpert_tools.__file__).parent):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run_command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zexpert_tools", *arguments]
    given = {**ENVIRONMENT, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=300)


def test_doctor_finds_nothing_where_all_is_well() -> None:
    result = zexpert("doctor")
    if CUDA_LIBRARY.exists() and torch.version.cuda is not None and not torch.cuda.is_available():
        pytest.skip("a PyTorch with CUDA and no GPU, which the doctor remarks upon")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PROBLEM" not in result.stdout
    assert result.stdout.endswith("\nzexpert works here\n")
    assert f"PyTorch {torch.__version__}" in result.stdout


def test_version_and_short_help() -> None:
    assert run_here("--version").stdout == f"zexpert {package.__version__}\n"
    assert "Usage" in run_here("bench", "-h").stdout


def test_doctor_names_variables_that_change_what_runs() -> None:
    result = zexpert("doctor", ZEXPERT_ROUTING_SIMULATION="round_robin", ZEXPERT_CPU_CAPABILITY="foo")
    assert result.returncode == 0, result.stdout
    assert "ZEXPERT_ROUTING_SIMULATION=round_robin replaces every router by a simulation" in result.stdout
    assert "ZEXPERT_CPU_CAPABILITY=foo is ignored" in result.stdout
    assert "the layer on the CPU gives the right result" in result.stdout


def test_doctor_explains_a_package_that_is_not_built(copy_of_the_package: Path) -> None:
    for library in (copy_of_the_package / "zexpert").glob("_C.*.so"):
        library.unlink()
    (copy_of_the_package / "zexpert" / "lib" / "libzexpert.so").unlink()
    result = run_command(copy_of_the_package, "doctor")
    assert result.returncode == 1
    assert "PROBLEM _C." in result.stdout
    assert "libzexpert.so is missing: this copy of zexpert is not built" in result.stdout
    assert "-> install a wheel, or build in the source tree" in result.stdout
    assert result.stdout.endswith("\n3 problems\n")
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("by", ["the current directory", "PYTHONPATH"])
def test_doctor_tells_of_another_package_of_this_name(copy_of_the_package: Path, tmp_path: Path, by: str) -> None:
    other = tmp_path / "other" / "zexpert"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    command = [sys.executable, "-m", "zexpert_tools", "doctor"]
    folder, path = (other, f"{other.parent}:") if by == "PYTHONPATH" else (other.parent, "")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{path}{copy_of_the_package}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert result.returncode == 1
    problem = f"PROBLEM here Python imports zexpert from {other}; this command belongs to {copy_of_the_package}"
    assert problem in result.stdout
    remedy = f"remove {other.parent} from PYTHONPATH" if by == "PYTHONPATH" else "start Python in another folder"
    assert f"-> {remedy}" in result.stdout


@pytest.mark.parametrize(
    ("imported", "installed", "level", "message"),
    [
        (PACKAGE, PACKAGE, None, ""),
        (PACKAGE, None, None, ""),
        (None, None, None, ""),
        (
            PACKAGE,
            Path("/venv/zexpert"),
            "note",
            f"{PACKAGE} comes before the zexpert that is installed, /venv/zexpert",
        ),
        (Path("/venv/zexpert"), Path("/venv/zexpert"), "note", "here Python imports zexpert from /venv/zexpert; this "),
        (
            Path("/x/zexpert.py"),
            PACKAGE,
            "problem",
            "here Python imports zexpert from /x/zexpert.py; this command belongs ",
        ),
    ],
)
def test_which_of_several_packages_is_meant(
    imported: Path | None, installed: Path | None, level: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "locate", lambda folder, *options: installed if "-E" in options else imported)
    findings = doctor.check_shadows()
    assert [finding.level for finding in findings] == ([] if level is None else [level])
    assert all(finding.what.startswith(message) and finding.remedy for finding in findings)


def test_doctor_explains_a_broken_library(copy_of_the_package: Path) -> None:
    (copy_of_the_package / "zexpert" / "lib" / "libzexpert.so").write_bytes(b"not a library")
    result = run_command(copy_of_the_package, "doctor")
    assert result.returncode == 1
    assert "PROBLEM zexpert cannot be imported" in result.stdout
    assert "does not load under PyTorch" in result.stdout
    other = run_command(copy_of_the_package, "info")
    assert other.returncode == 1
    assert other.stderr.startswith("error: zexpert cannot be imported: ")
    assert "zexpert doctor" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("raise ImportError('no torch today')", "PROBLEM PyTorch cannot be imported: no torch today"),
        ("__version__ = '2.4.1'\nclass version: cuda = None", "PROBLEM PyTorch is 2.4.1, zexpert needs 2.10 or later"),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
            "PyTorch cannot be imported: the process died of SIG",
        ),
    ],
)
def test_doctor_explains_a_wrong_torch(copy_of_the_package: Path, module: str, message: str) -> None:
    (copy_of_the_package / "torch.py").write_text(module)
    result = run_command(copy_of_the_package, "doctor")
    assert result.returncode == 1, result.stderr
    assert message in result.stdout
    assert "pip install 'torch>=2.10'" in result.stdout


def test_missing_packages_of_the_command_are_told(copy_of_the_package: Path) -> None:
    (copy_of_the_package / "typer.py").write_text("raise ModuleNotFoundError('gone', name='typer')")
    result = run_command(copy_of_the_package, "info")
    assert result.returncode == 1
    assert result.stderr == "error: the zexpert command needs typer: pip install 'zexpert[cli]'\n"
    assert run_command(copy_of_the_package, "doctor").stdout.endswith("zexpert works here\n")


def steps(**others: Any) -> dict[str, Any]:
    """What the probe tells on a machine with an H200 where all is well."""
    built = {"version": "0.1.0", "cuda_library": "loaded", "cuda_archs": ["8.0", "9.0a", "10.0+PTX"]}
    return {
        "torch": {"version": "2.14.1+cu130", "cuda": "13.0"},
        "zexpert": built,
        "gpus": {"gpus": [["NVIDIA H200", 9, 0]]},
        "cuda:0": {},
        **others,
    }


@pytest.mark.parametrize(
    ("changed", "gpus", "level", "message"),
    [
        ({}, ["/dev/nvidia0"], "ok", "the layer on cuda:0, NVIDIA H200, compute capability 9.0 gives the right result"),
        (
            {"gpus": {"gpus": [["Tesla V100", 7, 0]]}},
            ["/dev/nvidia0"],
            "problem",
            "no kernel image for cuda:0, Tesla V100, compute capability 7.0: zexpert was built for 8.0 9.0a 10.0+PTX",
        ),
        (
            {"zexpert": {"cuda_library": "not built", "cuda_archs": []}},
            ["/dev/nvidia0"],
            "problem",
            "there is a GPU, but zexpert's CUDA library is not built",
        ),
        (
            {"torch": {"version": "2.13.0+cpu", "cuda": None}},
            ["/dev/nvidia0"],
            "problem",
            "this machine has an NVIDIA GPU, but PyTorch 2.13.0+cpu has no CUDA",
        ),
        ({"torch": {"version": "2.13.0+cpu", "cuda": None}}, [], "ok", "PyTorch has no CUDA, and there is no GPU"),
        (
            {"gpus": {"gpus": [], "reason": "the driver is too old"}},
            ["/dev/nvidia0"],
            "problem",
            "PyTorch has CUDA but cannot use a GPU: the driver is too old",
        ),
        ({"gpus": {"gpus": []}}, [], "note", "PyTorch has CUDA but cannot use a GPU: it sees no GPU"),
        (
            {"cuda:0": {"error": "RuntimeError: CUDA error: out of memory"}},
            ["/dev/nvidia0"],
            "problem",
            "the layer on cuda:0, NVIDIA H200, compute capability 9.0 fails: CUDA error: out of memory",
        ),
    ],
)
def test_doctor_on_machines_with_gpus(
    changed: dict[str, Any], gpus: list[str], level: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = steps(**changed)
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "probe", lambda gpus=range(0): told)
    (finding,) = doctor.check_cuda(told)
    assert (finding.level, finding.what) == (level, message)
    assert (finding.remedy == "") == (level == "ok")


@pytest.mark.parametrize("archs", [["9.0"], ["8.0+PTX"]], ids=str)
def test_doctor_tells_of_a_build_without_the_experts_for_hopper(
    archs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = steps(zexpert={"cuda_library": "loaded", "cuda_archs": archs})
    monkeypatch.setattr(doctor, "probe", lambda gpus=range(0): told)
    right, note = doctor.check_cuda(told)
    assert (right.level, note.level) == ("ok", "note")
    assert note.what == (
        f"zexpert was built for {archs[0]}; its kernels for the experts on cuda:0, NVIDIA H200, compute capability 9.0 "
        "need 9.0a"
    )
    assert "TORCH_CUDA_ARCH_LIST=9.0a " in note.remedy


def test_doctor_names_a_missing_cuda_library() -> None:
    error = (
        "ImportError: libzexpert_cuda.so does not load: libcudart.so.13: cannot open shared object file: No such file"
    )
    finding = doctor.check_import({"zexpert": {"error": error}})
    assert finding.level == "problem"
    assert "a CUDA library is missing, libcudart.so.13" in finding.what


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["8.0", "9.0a"], (12, 0), False),
        (["9.0+PTX"], (12, 0), True),
        (["10.0+PTX"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_an_image_runs_on(archs: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert doctor.has_image(archs, *capability) is runs


# ---- bench ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose cache is small and whose rates are known, and a model that is smaller still."""
    monkeypatch.setattr(rates, "last_level_cache_bytes", lambda: 1 << 12)
    monkeypatch.setattr(rates, "measure_limits", lambda device, dtype: rates.Limits(1e9, 1e9))
    tiny = layer.Shape(torch_routing.RoutingCase("tiny", 8, 4, 0, 3, has_bias=True), 32, 16)
    monkeypatch.setitem(layer.MODELS, "small", tiny)


def run_here(*arguments: object) -> Any:
    """The command in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def run_bench(*arguments: str) -> Any:
    return run_here("bench", "--device", "cpu", "--repeats", "2", *arguments)


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("suite", ["routing", "epilogue", "layer", "training"])
def test_bench_measures_and_draws(suite: str, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    result = run_bench(suite, "--tokens", "1,5", "--json", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["benchmark"] == f"bench {suite}"
    assert report["settings"]["tokens"] == [1, 5]
    assert len(report["results"]) == 2
    for one in report["results"]:
        assert one["floor_s"] > 0
        assert {"zexpert"} < set(one["timings_s"]) == set(one["share_of_floor"]) == set(one["checks"])
        assert all(check["passed"] for check in one["checks"].values())
        assert {"median", "lower_quartile", "upper_quartile", "repeats"} == set(one["timings_s"]["zexpert"])
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.usefixtures("small_machine")
def test_a_floor_that_is_beaten_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([rates.Limits(1.0, 1.0), rates.Limits(2.0, 1e15), rates.Limits(1e15, 1.0)])
    monkeypatch.setattr(rates, "measure_limits", lambda device, dtype: next(measured))
    monkeypatch.setattr(rates, "read_rate", lambda num_bytes: 1.0)
    report = json.loads(run_bench("--tokens", "5", "--json").stdout)
    assert report["limits"] == {"bytes_per_s": 1e15, "operations_per_s": 1e15}
    assert max(report["results"][0]["share_of_floor"].values()) < 1.0


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_in_tables(dtype: str) -> None:
    result = run_bench("--tokens", "5", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    for part in ("tiny: layer, 5 tokens", "quartiles", "of floor", "plain PyTorch", "yes", "GB/s"):
        assert part in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bench_of_the_layer_on_a_gpu(dtype: str) -> None:
    """Whether or not its experts wait for the host."""
    result = run_here(
        "bench", "--device", "cuda", "--repeats", "2", "--model", "small", "--tokens", "5", "--dtype", dtype
    )
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("model", ["qwen3-zeda", "deepseek-v3"])
def test_bench_knows_other_routings(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layer.MODELS, model, layer.Shape(layer.MODELS[model].routing, 16, 8))
    result = run_bench("--model", model, "--tokens", "3", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["results"][0]["checks"]["zexpert"]["passed"]


@pytest.mark.usefixtures("small_machine")
def test_bench_tells_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer.PlainLayer, "forward", lambda self, hidden_states, router_logits: hidden_states)
    result = run_bench("--tokens", "4")
    assert result.exit_code == 1
    assert "Wrong output: tiny: layer, 4 tokens" in result.stdout


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt"), "--model must be one of small, longcat-flash, lite"),
        (("--tokens", "0"), "--tokens must be positive integers with commas between"),
        (("--tokens", "many"), "--tokens must be positive integers with commas between"),
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16, got int8"),
        (("--plot", "a.txt"), "--plot must end in .png, .pdf or .svg, got a.txt"),
        (("--threads", "100000"), "Invalid value for '--threads'"),
        (("--plot", "/no/such/folder/a.png"), "--plot must be in a folder that exists"),
        (("--repeats", "0"), "Invalid value for '--repeats'"),
        (("sleep",), "Invalid value for"),
    ],
)
def test_mistakes_in_bench(arguments: tuple[str, ...], message: str) -> None:
    result = run_bench(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("by", ["PyTorch", "an operator"])
def test_running_out_of_memory_is_told(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        if by == "PyTorch":
            torch.empty(2**50)
        package.ops.zero_expert_accumulate(torch.zeros(1).expand(2**40, 1024), torch.zeros(1).expand(2**40))

    monkeypatch.setattr(bench, "measure", measure)
    result = run_here("bench", "layer")
    assert result.exit_code == 2
    assert "error: out of memory: try fewer tokens or a smaller model" in result.stderr


def test_a_layer_too_large_for_the_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_memory", lambda device: 8 << 30)
    cpu = torch.device("cpu")
    with pytest.raises(
        ValueError, match=r"^--model must fit the memory: this layer needs 54.0 GiB in bfloat16, 8.0 GiB"
    ):
        bench.check_memory(layer.MODELS["longcat-flash"], torch.bfloat16, cpu, 1, training=False)
    small = layer.MODELS["small"]
    assert bench.check_memory(small, torch.float32, cpu, 3, training=False) == 3
    assert bench.check_memory(small, torch.float32, cpu, 99, training=False) < 20


# ---- profile --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained byte decoder."""
    config = ByteDecoderConfig(hidden_size=32, num_layers=3, num_heads=2, context_length=64, intermediate_size=16)
    trainer = Trainer(ByteDecoder(config), torch.randint(256, (2000,), dtype=torch.uint8), TrainerConfig(steps=1))
    path = tmp_path_factory.mktemp("profile") / "checkpoint.pt"
    save_checkpoint(trainer, path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {number}: the cat sat on the mat.\n" for number in range(20)))
    return path


def check_profile(told: dict[str, Any], num_tokens: int, num_layers: int, out: Path) -> None:
    assert told["num_tokens"] == num_tokens
    assert len(told["layers"]) == num_layers
    means = []
    for one in told["layers"].values():
        assert sum(one["ffn_slots_histogram"]) == one["num_tokens"] == num_tokens
        assert len(one["ffn_slots_histogram"]) == told["top_k"] + 1
        means.append(sum(one["expert_load"]) / num_tokens)
    assert told["mean_ffn_slots"] == pytest.approx(sum(means) / num_layers)
    assert 0 < told["mean_ffn_slots"] < told["top_k"]
    for name in ("profile.png", "tokens.png"):
        assert (out / name).read_bytes().startswith(PNG)


def test_profile_of_a_demo_checkpoint(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = zexpert("profile", checkpoint, "--text", text, "--out", out, "--json", "--max-tokens", 300)
    assert result.returncode == 0, result.stderr
    check_profile(json.loads(result.stdout), 300, 3, out)
    shown = zexpert("profile", checkpoint, "--text", text, "--out", out)
    assert shown.returncode == 0, shown.stderr
    for part in ("Line 0: the cat sat", "FFN experts", "layers.2.moe", "idle", "feed-forward experts per token"):
        assert part in shown.stdout
    assert "\x1b" not in shown.stdout


@pytest.fixture
def longcat_folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from test_integrations_transformers import longcat

    words = ["[UNK]", "the", "cat", "sat", "on", "mat", "Line", ":", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "longcat"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    longcat().save_pretrained(folder)
    return folder


def test_profile_of_a_model_of_transformers(longcat_folder: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--text", text, "--out", tmp_path / "out", "--json", "--window", 50)
    result = zexpert("profile", longcat_folder, *arguments)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    check_profile(told, 20 * 10, 2, tmp_path / "out")
    assert told["kind"] == "LongcatFlashForCausalLM"
    wide = longcat_folder / "tokenizer.json"
    wide.write_text(wide.read_text().replace('"cat": 2', '"cat": 5000'))
    result = zexpert("profile", longcat_folder, *arguments)
    assert result.returncode == 2
    assert "tokenizer must give tokens below the model's" in result.stderr
    (longcat_folder / "tokenizer.json").unlink()
    (longcat_folder / "tokenizer_config.json").unlink()
    broken = zexpert("profile", longcat_folder, *arguments)
    assert broken.returncode == 2
    assert "must hold a tokenizer, too" in broken.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "cannot read checkpoint"),
        ("file", b"no checkpoint", "is not a checkpoint of a byte decoder"),
        ("folder/x", b"", "folder must have a config.json; profile accepts checkpoints of zexpert demo and folders"),
        (
            "qwen/config.json",
            b'{"model_type": "qwen3_moe"}',
            'must hold a model of model_type "longcat_flash", got \'qwen3',
        ),
        ("odd/config.json", b"[", "must be a model's configuration"),
    ],
)
def test_mistakes_in_profile(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    result = run_here("profile", tmp_path / Path(name).parts[0], "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_what_a_pipe_cannot_encode_is_replaced(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zexpert_tools", "profile", str(checkpoint), "--text", str(text)]
    command += ["--out", str(tmp_path / "out"), "--max-tokens", "100"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Line 0: the cat sat on the mat.?" in done.stdout


# ---- Colours --------------------------------------------------------------------------------------------------------


def test_the_legend_is_for_colours_alone() -> None:
    slots = torch.tensor([[1, 4, 2]])
    coloured = pictures.coloured_text(["a", "b", "\n"], slots, 6)
    plain = pictures.coloured_text(["a", "b", "\n"], slots, 6, colours=False)
    assert " 1.0  1.8  2.5  3.2  4.0 " in coloured.plain
    assert coloured.spans
    assert not plain.spans
    assert plain.plain.startswith("ab\u21b5\n\nfeed-forward")
    assert pictures.coloured_text(["a", "b"], slots[:, :2], 6).plain.startswith("ab\n\nfeed-forward")
    assert "1.0 to 4.0 of 6 chosen" in plain.plain


# ---- Widths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("info",), ("plan",)], ids=lambda arguments: arguments[0])
def test_output_fits_80_columns_and_is_neither_wrapped_nor_padded_in_a_pipe(arguments: tuple[str, ...]) -> None:
    narrow = zexpert(*arguments, COLUMNS="80").stdout.splitlines()
    assert max(map(len, narrow)) <= 80
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "zexpert_tools", *arguments]
    piped = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300).stdout.splitlines()
    assert [line for line in piped if line != line.rstrip()] == []
    if arguments == ("plan",):  # headings are whole, and what is assumed is one line
        headings = [line for line in narrow if "GPUs" in line and "\u2503" in line]
        assert len(headings) == len([line for line in narrow if line.startswith("\u250f")]) == 4
        assert piped[1].startswith("Assumed: ")
        assert piped[1].endswith(" TFLOP/s")


def test_framed_text_is_no_wider_than_it_reads_well() -> None:
    for width, expected in ((60, 60), (1000, terminal.PANEL_WIDTH)):
        console = Console(width=width, file=io.StringIO(), no_color=True)
        terminal.print_panel(console, "title", "word " * 300)
        assert {len(line) for line in console.file.getvalue().splitlines()} == {expected}  # type: ignore[attr-defined]


def test_a_command_ends_quietly_where_nobody_reads_on() -> None:
    for arguments in (["info"], ["info", "--json"], ["doctor"]):
        command = [sys.executable, "-m", "zexpert_tools", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == -signal.SIGPIPE
