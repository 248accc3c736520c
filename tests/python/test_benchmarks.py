# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness measures what it says; the benchmarks run. No test looks at a time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from zexpert_tools.benchmark import harness, layer, machine, rates, torch_routing
from zexpert_tools.benchmark.layer import LayerResult

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """A clock that a contender moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose cache is small and whose rates are known, so that tests are quick."""
    monkeypatch.setattr(rates, "last_level_cache_bytes", lambda: 1 << 12)
    monkeypatch.setattr(rates, "read_rate", lambda num_bytes: 1e9)
    monkeypatch.setattr(rates, "matmul_rate", lambda dtype: 1e9)


def test_contenders_take_turns_and_inputs_rotate() -> None:
    calls: list[tuple[str, int]] = []
    contenders = {name: (lambda i, name=name: calls.append((name, i))) for name in "abc"}
    timings = harness.measure(contenders, num_inputs=4, repeats=4, warmup=0)
    names = "".join(name for name, _ in calls)
    assert names == "abcbcacababc"
    assert [index for _, index in calls] == [call % 4 for call in range(12)]
    assert all(timing.repeats == 4 for timing in timings.values())


def test_medians_are_of_timed_repetitions_only() -> None:
    clock = Clock()
    durations = iter([100.0, 100.0, 1.0, 2.0, 3.0, 4.0, 10.0])  # the first two are the warm-up

    def run(_: int) -> None:
        clock.now += next(durations)

    timing = harness.measure({"x": run}, num_inputs=1, repeats=5, warmup=2, clock=clock)["x"]
    assert timing == harness.Timing(median=3.0, lower_quartile=2.0, upper_quartile=4.0, repeats=5)


def test_measure_needs_a_repetition() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        harness.measure({"x": lambda _: None}, num_inputs=1, repeats=0)


@pytest.mark.parametrize("num_contenders", [1, 2, 3, 4])
@pytest.mark.parametrize("bytes_per_input", [0, 1, 1 << 20, 1 << 29, 1 << 40])
def test_rotation_meets_every_input_and_fits(bytes_per_input: int, num_contenders: int) -> None:
    length = harness.rotation_length(bytes_per_input, num_contenders)
    assert length >= 2
    assert math.gcd(length, num_contenders) == 1
    assert length <= 64 + num_contenders


def test_error_rule() -> None:
    expected = torch.tensor([1.0, -2.0, 1000.0], dtype=torch.float64)
    exact = expected.float()
    off = exact + torch.tensor([0.0, 0.0, 0.01])
    assert harness.check_error(exact, exact, expected).passed
    assert harness.check_error(off, off, expected).passed
    assert not harness.check_error(off, exact, expected).passed
    assert not harness.check_error(exact * torch.nan, off, expected).passed
    assert harness.check_error(exact[:0], exact[:0], expected[:0]).passed


def case_result(passed: bool) -> harness.CaseResult:
    return harness.CaseResult(
        case="small",
        subject="zexpert",
        floor=1e-3,
        timings={"zexpert": harness.Timing.of([2e-3, 2e-3]), "plain": harness.Timing.of([4e-3, 8e-3])},
        checks={"zexpert": harness.ErrorCheck(1e-7, 1e-7, passed)},
        other_load=0.5,
        target=harness.Target("plain", 2.5),
    )


def test_limits_are_the_most_that_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = iter([3.0, 9.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(rates, "SHORTEST", 0.0)
    assert rates.largest(lambda: next(rate)) == 9.0
    assert rates.Limits(2.0, 30.0).best(rates.Limits(3.0, 20.0)) == rates.Limits(3.0, 30.0)


def test_a_floor_is_the_caches_where_the_data_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "last_level_cache_bytes", lambda: 1000)
    monkeypatch.setattr(rates, "read_rate", lambda num_bytes: 50.0)
    cpu = torch.device("cpu")
    assert rates.bandwidth_for(3999, cpu, 10.0) == 50.0
    assert rates.bandwidth_for(3999, cpu, 60.0) == 60.0
    assert rates.bandwidth_for(4000, cpu, 10.0) == 10.0
    assert rates.bandwidth_for(3999, torch.device("cuda"), 10.0) == 10.0


def test_a_case_knows_that_its_floor_is_beaten() -> None:
    result = case_result(passed=True)
    assert not result.floor_is_beaten
    result.floor = 3e-3
    assert result.floor_is_beaten


def test_report_as_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    assert harness.finish("name", {"repeats": 2}, [case_result(passed=True)], path) == 0
    report = json.loads(path.read_text())
    (result,) = report["results"]
    assert report["benchmark"] == "name"
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert result["target"] == {"over": "plain", "at_least": 2.5, "reached": 3.0, "met": True}
    assert result["share_of_floor"]["zexpert"] == 0.5
    assert result["speedup_of_zexpert_over"] == {"plain": 3.0}


def test_wrong_output_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = case_result(passed=False)
    harness.print_case(result)
    assert harness.finish("name", {}, [result], None) == 1
    out = capsys.readouterr().out
    assert "target met (>= 2.5x plain; the floor is 6.00x)" in out
    assert "WRONG OUTPUT: small: zexpert" in out
    assert "others used 50% of the processors" in out


def test_report_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import markdown_tables

    path = tmp_path / "report.json"
    harness.finish("name", {}, [case_result(passed=True)], path)
    assert markdown_tables.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "| case | floor | zexpert | plain | target |" in out
    assert "| small | 1.00 ms | **2.00 ms** (50%) | 6.00 ms (3.00x) | 2.5x met |" in out
    assert markdown_tables.main([str(tmp_path / "missing.json")]) == 2

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: report.json -->\nold\n<!-- end of table -->\nafter\n")
    assert markdown_tables.main([str(page)]) == 0
    assert page.read_text().startswith("before\n<!-- table: report.json -->\n\n")
    assert "| small | 1.00 ms | **2.00 ms** (50%) | 6.00 ms (3.00x) | 2.5x met |" in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().endswith("\n<!-- end of table -->\nafter\n")
    page.write_text("<!-- table: missing.json -->\n<!-- end of table -->\n")
    assert markdown_tables.main([str(page)]) == 2


def test_a_report_from_a_gpu_names_the_gpu_first() -> None:
    import markdown_tables

    on_a_gpu = {"gpu": "NVIDIA H200", "gpu_memory_bytes": 140 * 2**30}
    host = {"processor": "Xeon", "features": ["avx2"], "cores": 16, "last_level_cache_bytes": 32 << 20}
    environment = {"date": "2026-01-02T03:04:05", "versions": {"torch": "2.11"}, **host}
    assert markdown_tables.machine(environment) == (
        "2026-01-02; Xeon (avx2), 16 cores, 32 MiB last-level cache; torch 2.11."
    )
    told = "2026-01-02; NVIDIA H200, 140 GiB; its host Xeon, 16 cores; torch 2.11."
    assert markdown_tables.machine({**environment, **on_a_gpu}) == told
    del on_a_gpu["gpu_memory_bytes"]
    assert markdown_tables.machine({**environment, **on_a_gpu}) == told.replace(", 140 GiB", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_environment_has_the_gpu_that_was_used() -> None:
    torch.cuda.init()
    environment = machine.environment()
    assert environment["gpu"] == torch.cuda.get_device_name()
    assert environment["gpu_memory_bytes"] > 0


def test_tables_of_the_documentation_are_those_of_its_measurements() -> None:
    import markdown_tables

    page = ROOT / "docs" / "performance.md"
    text = page.read_text()
    assert "<!-- table: " in text
    assert markdown_tables.with_tables(text, page.parent) == text


def test_roofline_tells_contenders_and_models_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("zexpert_tools.benchmark.plots", reason="matplotlib is missing", exc_type=ImportError)
    seconds = {"zexpert": 1e-3, "plain": 2e-3}
    results = [
        LayerResult(
            case=model,
            subject="zexpert",
            floor=1e-4,
            timings={name: harness.Timing.of([time]) for name, time in seconds.items()},
            checks={},
            other_load=0.0,
            name=model,
            num_tokens=tokens,
            operations=1e6 * tokens,
            num_bytes=1e6,
        )
        for model in ("small", "large")
        for tokens in (1, 16)
    ]
    monkeypatch.setattr(plots.plt, "close", lambda _: None)
    plots.save_roofline(tmp_path / "roofline.png", results, rates.Limits(1e9, 1e9), device_name="a machine")
    (axes,) = plots.plt.gcf().axes
    monkeypatch.undo()
    plots.plt.close("all")

    def look(label: str) -> tuple[object, ...]:
        (line,) = [line for line in axes.get_lines() if line.get_label() == label]
        return line.get_color(), line.get_linestyle(), line.get_marker()

    looks = {(name, model): look(f"{name}, {model}") for name in seconds for model in ("small", "large")}
    for name in seconds:
        assert looks[name, "small"][:2] == looks[name, "large"][:2]
    assert looks["zexpert", "small"][0] != looks["plain", "small"][0]
    for model, other in (("small", "large"), ("large", "small")):
        assert looks["zexpert", model][2] == looks["plain", model][2] != looks["plain", other][2]
    shown = {handle.get_label(): handle for handle in axes.get_legend().legend_handles}
    assert list(shown) == ["the most this machine can do", "zexpert", "plain", "small", "large"]
    for name in seconds:
        assert shown[name].get_color() == looks[name, "small"][0]
    for model in ("small", "large"):
        assert shown[model].get_marker() == looks["zexpert", model][2]


def test_roofline_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import roofline

    path = Path(__file__).parents[2] / "docs/benchmarks/gpu_layer.json"
    results = json.loads(path.read_text())["results"]
    assert [LayerResult.from_json(result).as_json() for result in results] == results
    assert roofline.main([str(path), str(tmp_path / "roofline.png")]) == 0
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        roofline.main([str(path.with_name("cpu_layer.json")), str(tmp_path / "other.png")])
    assert "cpu_layer.json is not gpu_layer.py's: KeyError: 'gpu'" in " ".join(capsys.readouterr().err.split())


def test_other_load_is_a_share() -> None:
    with machine.OtherLoad() as others:
        sum(range(10_000))
    assert 0.0 <= others.share <= 1.0


def test_table_is_aligned() -> None:
    table = harness.format_table(["name", "time"], [["a", "1 ms"], ["longer", "10 ms"]])
    assert table.splitlines() == ["name     time", "------  -----", "a        1 ms", "longer  10 ms"]


@pytest.mark.parametrize("case", torch_routing.CASES, ids=lambda case: case.name)
def test_torch_routing_is_the_reference(case: torch_routing.RoutingCase) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, case.num_experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(case.num_experts, generator=generator, dtype=torch.float64) * 0.01 if case.has_bias else None
    expected = reference.biased_topk(
        logits,
        bias,
        case.top_k,
        num_real_experts=case.num_real_experts,
        num_identity_experts=case.num_identity_experts,
        scoring_func=case.scoring_func,
        renormalize=case.renormalize,
        routed_scaling_factor=case.routed_scaling_factor,
        num_expert_group=case.num_expert_group,
        topk_group=case.topk_group,
    )
    assert not torch_routing.near_ties(logits, bias, case).any()
    torch.testing.assert_close(
        torch_routing.dense_weights(*torch_routing.route(logits, bias, case), case),
        torch_routing.dense_weights(expected.topk_weights, expected.topk_ids, expected.zero_weight, case),
    )


def test_torch_routing_refuses_a_scoring_function_that_it_does_not_know() -> None:
    case = torch_routing.RoutingCase("unknown", 4, 0, 0, 2, "relu")
    with pytest.raises(ValueError, match=r"^scoring_func must be one that this module computes, got 'relu'$"):
        torch_routing.route(torch.zeros(1, 4), None, case)


def test_near_ties_are_found() -> None:
    case = torch_routing.RoutingCase("tie", 4, 0, 0, 2)
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    assert torch_routing.near_ties(logits, None, case).tolist() == [True, False]
    groups = torch_routing.RoutingCase("tie", 4, 0, 0, 1, num_expert_group=2, topk_group=1)
    logits = torch.tensor([[3.0, 2.0, 2.0, 3.0], [3.0, 2.0, 2.0, 2.5]])
    assert torch_routing.near_ties(logits, None, groups).tolist() == [True, False]


def run_benchmark(module: ModuleType, arguments: list[str], path: Path) -> dict[str, object]:
    assert module.main([*arguments, "--json", str(path)]) == 0
    report: dict[str, object] = json.loads(path.read_text())
    return report


@pytest.mark.usefixtures("small_machine")
def test_cpu_routing_runs(tmp_path: Path) -> None:
    import cpu_routing

    arguments = ["--tokens", "1,5", "--dtype", "float32,bfloat16", "--repeats", "1", "--threads", "1"]
    report = run_benchmark(cpu_routing, arguments, tmp_path / "routing.json")
    results = report["results"]
    assert isinstance(results, list)
    assert len(results) == 4 * len(torch_routing.CASES)


def test_host_time_runs(tmp_path: Path) -> None:
    import host_time

    threads = torch.get_num_threads()
    try:
        report = run_benchmark(host_time, ["--device", "cpu", "--repeats", "2"], tmp_path / "host_time.json")
    finally:
        torch.set_num_threads(threads)
    medians = report["median_us"]
    assert isinstance(medians, dict)
    assert "layer" in medians
    assert any(name.startswith("biased_topk") for name in medians)
    assert any(name in medians for name in ("fused_moe", "grouped_mlp"))
    assert all(median > 0 for median in medians.values())


@pytest.mark.usefixtures("small_machine")
def test_layer_cases_start_from_hidden_states_or_logits() -> None:
    shape = layer.Shape(layer.SMALL.routing, 16, 16)
    weights = [layer.make_weights(shape, torch.float32, torch.device("cpu"), unused=True)]
    limits = rates.Limits(bandwidth=1e9, rate=1e12)
    whole, behind = (
        layer.run_case(shape, 3, weights, limits=limits, repeats=1, router_projection=start, say=lambda _: None)
        for start in (True, False)
    )
    assert whole.case.startswith("small: layer, 3 tokens")
    assert behind.case.startswith("small: layer from logits, 3 tokens")
    assert whole.operations - behind.operations == 2 * 3 * 16 * 96  # tokens, hidden size, experts
    assert whole.num_bytes - behind.num_bytes == 4 * 16 * 96
    assert all(check.passed for result in (whole, behind) for check in result.checks.values())


@pytest.mark.usefixtures("small_machine")
def test_cpu_layer_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cpu_layer

    arguments = ["--tokens", "1,5", "--repeats", "1", "--threads", "1", "--breakdown"]
    sizes = ["--hidden-size", "32", "--intermediate-size", "16"]
    report = run_benchmark(cpu_layer, [*arguments, *sizes], tmp_path / "layer.json")
    results = report["results"]
    assert isinstance(results, list)
    assert len(results) == 4
    assert "grouped_mlp" in capsys.readouterr().out


def test_expert_parallel_runs(tmp_path: Path) -> None:
    import gpu_expert_parallel

    sizes = ["--experts", "8", "--hidden-size", "16", "--intermediate-size", "8", "--tokens", "5,600"]
    arguments = ["--device", "cpu", *sizes, "--repeats", "1"]
    report = run_benchmark(gpu_expert_parallel, arguments, tmp_path / "expert_parallel.json")
    few, many = report["results"]  # type: ignore[misc]
    assert set(few["checks"]) == {"symmetric", "ragged", "ragged, 4 chunks", "all slots", "fixed", "all_gather"}
    assert set(many["seconds"]) == {"one rank", "symmetric", "ragged", "ragged, 4 chunks", "all slots"}
    assert 0 < many["bytes_sent"]["ragged"] < many["bytes_sent"]["all slots"]
    with pytest.raises(SystemExit) as stop:
        gpu_expert_parallel.main(["--device", "cpu", "--experts", "9"])
    assert stop.value.code == 2


@pytest.mark.usefixtures("small_machine")
def test_transformers_model_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import transformers_model

    arguments = ["--device", "cpu", "--layers", "1", "--hidden-size", "64", "--prompt", "3", "--repeats", "1"]
    report = run_benchmark(transformers_model, arguments, tmp_path / "model.json")
    results = report["results"]
    assert isinstance(results, list)
    assert len(results) == 3


@pytest.mark.parametrize(
    ("module_name", "arguments", "message"),
    [
        ("gpu_routing", ["--cases", "768,12"], "argument --cases: must be of 768, 384, 896, 256, got '12'"),
        ("gpu_layer", ["--shapes", "tiny"], "argument --shapes: must be of longcat, lite, qwen3, got 'tiny'"),
        ("gpu_experts", ["--shapes", ""], "argument --shapes: must be of longcat, lite, qwen3, got ''"),
        ("gpu_experts", ["--tile-rows", "0,60"],
         "argument --tile-rows: must be multiples of 8 up to 288, separated by commas, got '0,60'"),
        *((f"gpu_{name}", ["--tokens", "1,0"],
           "argument --tokens: must be positive integers, separated by commas, got '1,0'")
          for name in ("routing", "layer", "epilogue", "experts")),
        *((f"gpu_{name}", ["--repeats", "0"], "argument --repeats: must be a positive integer, got '0'")
          for name in ("routing", "layer", "epilogue", "experts")),
    ],
)  # fmt: skip
def test_bad_arguments_are_told_before_a_gpu_is_looked_for(
    module_name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        __import__(module_name).main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("module_name", ["cpu_routing", "cpu_layer"])
@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--dtype", "int8"], ["--repeats", "-1"]])
def test_bad_arguments_are_refused(module_name: str, arguments: list[str]) -> None:
    module = __import__(module_name)
    with pytest.raises(SystemExit) as stop:
        module.main(arguments)
    assert stop.value.code == 2
