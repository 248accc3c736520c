# SPDX-License-Identifier: Apache-2.0
"""record_choices and replay_choices: every kind of layer and runner, gradients, nesting, errors, modes of PyTorch."""

from __future__ import annotations

import copy
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import parallel_cases
import zexpert
from layer_cases import HIDDEN, LAYERS, NUM_EXPERTS, TOP_K, make_inputs, make_layer, num_columns
from ranks import Ranks
from testing import assert_equal
from zexpert import FusedMoE, record_choices, replay_choices
from zexpert.choices import record_of_routed_experts
from zexpert.integrations.sglang import routed_experts
from zexpert.ops import biased_topk_choices

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Model(nn.Module):
    """Two layers with a classifier each."""

    def __init__(self, kind: str = "mixed", **arguments: Any) -> None:
        super().__init__()
        self.moes = nn.ModuleList(make_layer(kind, seed=seed, **arguments) for seed in (0, 1))
        self.classifiers = nn.ModuleList(nn.Linear(HIDDEN, num_columns(kind), bias=False) for _ in self.moes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for moe, classifier in zip(self.moes, self.classifiers, strict=True):
            hidden_states = hidden_states + moe(hidden_states, 3 * classifier(hidden_states))
        return hidden_states


def chosen_by(layer: FusedMoE, router_logits: Tensor) -> Tensor:
    router: Any = layer.runner.router
    return biased_topk_choices(router_logits, router.e_score_correction_bias, router.top_k, **router._keywords)


@pytest.mark.parametrize("device", DEVICES, indirect=False)
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str, chunk_size: int | None, device: str) -> None:
    layer = make_layer(kind, chunk_size=chunk_size).to(device)
    x, logits = (tensor.to(device) for tensor in make_inputs(kind, 11))
    expected, expected_of_few = layer(x, logits), layer(x[:3], logits[:3])
    with record_choices(layer) as record:
        first = layer(x, logits)
        layer(x[:3], logits[:3])
    assert_equal(first, expected)
    choices = chosen_by(layer, logits)
    assert_equal(record[""], torch.cat((choices, choices[:3])).to(torch.int16))
    assert int(record[""].max()) >= (NUM_EXPERTS if kind != "plain" else 0), "zero experts have their own number"

    with replay_choices(layer, record):
        assert_equal(layer(x, logits), expected)
        assert_equal(layer(x[:3], logits[:3]), expected_of_few)
    assert_equal(layer(x, logits), expected)


@pytest.mark.parametrize("kind", ["mixed", "grouped"])
def test_choices_of_one_model_decide_in_another(kind: str) -> None:
    """Weights come from the other model's logits, and gradients reach its classifiers."""
    server, trainer = Model(kind), Model(kind)
    for classifier in trainer.classifiers:
        nn.init.normal_(classifier.weight)
    x = torch.randn(9, HIDDEN)
    with record_choices(server) as record, torch.no_grad():
        server(x)
    assert list(record) == ["moes.0", "moes.1"]
    with record_choices(trainer) as own, torch.no_grad():
        trainer(x)
    assert not torch.equal(own["moes.0"], record["moes.0"])

    with replay_choices(trainer, record), record_choices(trainer) as replayed:
        out = trainer(x)
        out.square().sum().backward()
    for name in record:
        assert_equal(replayed[name], record[name])
    for classifier, moe in zip(trainer.classifiers, trainer.moes, strict=True):
        assert classifier.weight.grad is not None
        assert bool((classifier.weight.grad != 0).any())
        used = set(record["moes.0" if moe is trainer.moes[0] else "moes.1"].unique().tolist())
        has_gradient = moe.w13_weight.grad.flatten(1).abs().sum(1) > 0
        assert has_gradient.tolist() == [expert in used for expert in range(NUM_EXPERTS)]


def test_gradient_of_a_replay_is_that_of_a_constant_choice() -> None:
    layer = make_layer("mixed", params_dtype=torch.float64)
    x, logits = make_inputs("mixed", 6, torch.float64)
    with record_choices(layer) as record:
        layer(x, logits)
    other = logits + torch.randn_like(logits)

    def replayed(logits: Tensor) -> Tensor:
        with replay_choices(layer, record):
            out: Tensor = layer(x, logits)
        return out

    torch.autograd.gradcheck(replayed, other.requires_grad_())


def test_scaled_weights_of_a_replay() -> None:
    """The sums of a row's weights, computed by hand."""
    layer = FusedMoE(4, 2, 8, 8, zero_expert_type="identity", zero_expert_num=2, routed_scaling_factor=3.0)
    nn.init.zeros_(layer.w13_weight)
    nn.init.zeros_(layer.w2_weight)
    x, logits = torch.randn(2, 8), torch.randn(2, 6)
    scores = logits.double().softmax(1)
    with replay_choices(layer, {"": torch.tensor([[4, 0], [5, 4]])}):
        out = layer(x, logits)
    weight = 3.0 * torch.stack((scores[0, 4], scores[1, 4] + scores[1, 5]))
    torch.testing.assert_close(out, (weight[:, None] * x).float())


def test_empty_slots() -> None:
    layer = make_layer("identity")
    x, logits = make_inputs("identity", 4)
    with replay_choices(layer, {"": torch.full((4, TOP_K), -1)}):
        assert_equal(layer(x, logits), torch.zeros_like(x))


def test_nested_blocks() -> None:
    layer = make_layer("mixed")
    x, logits = make_inputs("mixed", 5)
    with record_choices(layer) as plain:
        layer(x, logits)
    reversed_rows = {"": plain[""].flip(0)}
    with record_choices(layer) as outside:
        with replay_choices(layer, plain), record_choices(layer) as inside:
            layer(x, logits)
        with replay_choices(layer, plain):
            with replay_choices(layer, reversed_rows):
                layer(x, logits)
            layer(x, logits)
    assert_equal(inside[""], plain[""])
    assert_equal(outside[""], torch.cat((plain[""], reversed_rows[""], plain[""])))


def test_an_exception_restores_the_model() -> None:
    layer = make_layer("mixed")
    x, logits = make_inputs("mixed", 5)
    before = layer(x, logits)
    with pytest.raises(KeyError, match="stop"), record_choices(layer) as record:
        layer(x, logits)
        raise KeyError("stop")
    assert record[""].shape == (5, TOP_K)
    with pytest.raises(KeyError, match="stop"), replay_choices(layer, {"": torch.zeros(9, TOP_K).int()}):
        raise KeyError("stop")
    assert layer.runner.router._choice_taps == ()
    assert_equal(layer(x, logits), before)


@pytest.mark.parametrize("max_tokens", [None, 20])
def test_checkpointing_records_a_forward_once(max_tokens: int | None) -> None:
    model = Model()
    x = torch.randn(6, HIDDEN, requires_grad=True)
    with record_choices(model, max_tokens) as record:
        for _ in range(2):
            checkpoint(model, x, use_reentrant=False).sum().backward()
        last = checkpoint(model, x[:3], use_reentrant=False)
    last.sum().backward()
    assert [tuple(rows.shape) for rows in record.values()] == [(15, TOP_K)] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_replay(use_reentrant: bool) -> None:
    model = Model()
    inputs = [torch.randn(n, HIDDEN, requires_grad=True) for n in (6, 2)]
    record = {name: torch.rand(8, num_columns("mixed")).argsort(1)[:, :TOP_K] for name in ("moes.0", "moes.1")}

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        with replay_choices(model, record):
            for x in inputs:
                run(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    repeated = gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    for one, other in zip(repeated, gradients(model), strict=True):
        torch.testing.assert_close(one, other)  # a reentrant checkpoint's forward, without gradients, rounds otherwise


def test_checkpointing_out_of_order_is_refused() -> None:
    layer = make_layer("identity")
    x, logits = make_inputs("identity", 5)
    x.requires_grad_()
    with (
        pytest.raises(RuntimeError, match=r"layer '' must repeat its last call, of 2 tokens, in the backward, got 3"),
        replay_choices(layer, {"": torch.tensor([[0, 1, 2]] * 5)}),
    ):
        first = checkpoint(layer, x[:3], logits[:3], use_reentrant=False)
        checkpoint(layer, x[3:], logits[3:], use_reentrant=False)
        first.sum().backward()


def replay_on_ranks(group: Any) -> None:
    """Each rank records and replays its own tokens; replaying other choices gives what one process gives."""
    for exchange in parallel_cases.EXCHANGES:
        layer = parallel_cases.make_parallel("mixed", exchange, group)
        whole = parallel_cases.make_layer("mixed")
        x, logits, _ = parallel_cases.make_inputs("mixed", sum(parallel_cases.NUM_TOKENS))
        counts = [*parallel_cases.NUM_TOKENS[: group.size()]]
        own = slice(sum(counts[: group.rank()]), sum(counts[: group.rank() + 1]))
        x, logits = x.float(), logits.float()
        with record_choices(layer) as record, record_choices(whole) as expected:
            layer(x[own], logits[own])
            whole(x, logits)
        assert_equal(record[""], expected[""][own])
        other = logits + torch.randn_like(logits)
        with replay_choices(layer, record), replay_choices(whole, expected):
            out, reference = layer(x[own], other[own]), whole(x, other)
        torch.testing.assert_close(out, reference[own], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_expert_parallelism(ranks: Ranks) -> None:
    ranks.run(replay_on_ranks, 3)


def test_an_expert_map_is_applied_after_the_choice() -> None:
    layer = make_layer("identity")
    layer.runner.router.set_expert_map(torch.arange(NUM_EXPERTS).flip(0)[:, None])
    x, logits = make_inputs("identity", 7)
    expected = layer(x, logits)
    with record_choices(layer) as record:
        layer(x, logits)
    assert_equal(record[""], chosen_by(layer, logits).to(torch.int16))
    with replay_choices(layer, record):
        assert_equal(layer(x, logits), expected)


@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
def test_a_router_alone(indices_dtype: torch.dtype) -> None:
    runner = make_layer("identity").runner
    runner.router.indices_dtype = indices_dtype
    x, logits = make_inputs("identity", 5)
    expected = runner.router.select_experts(x, logits)
    with record_choices(runner) as record:
        runner.router.select_experts(x, logits)
    with replay_choices(runner, record):
        for one, other in zip(runner.router.select_experts(x, logits), expected, strict=True):
            assert_equal(one, other)


# ---- Errors --------------------------------------------------------------------------------------------------------


def test_errors_of_records() -> None:
    model = Model()
    x = torch.randn(4, HIDDEN)
    with record_choices(model) as record:
        model(x)
    rows = record["moes.1"]
    for bad, message in (
        ({**record, "moes.1": rows[:3]}, r"record must have a row for each token of layer 'moes.1', at least 4, got 3"),
        ({**record, "moes.1": rows.repeat(2, 1)}, r"record must have 4 rows for layer 'moes.1', .* got 8"),
        ({**record, "moes.1": rows[:, 1:]}, r"record must have shape \[tokens, 3\] for layer 'moes.1', got \[4, 2\]"),
        ({**record, "moes.1": rows.float()}, r"record must have integer tensors, got torch.float32 for layer 'moes.1'"),
        ({**record, "moes.1": None}, r"record must have integer tensors, got NoneType for layer 'moes.1'"),
        ({"moes.0": rows}, r"record must have every layer of the model, got none for 'moes.1'"),
        ({**record, "other": rows}, r"record must have layers of the model alone, got 'other'"),
        ([], r"record must be a mapping from layer names to tensors, got list"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"), replay_choices(model, bad):
            model(x)
        assert all(moe.runner.router._choice_taps == () for moe in model.moes)
    with (
        pytest.raises(RuntimeError, match=r"^choices must be experts from 0 to 9, .* got 10 for token 0"),
        replay_choices(model, {**record, "moes.1": torch.full_like(rows, 10)}),
    ):
        model(x)


def test_errors_of_models() -> None:
    for context in (record_choices, lambda model: replay_choices(model, {})):
        with (
            pytest.raises(ValueError, match=r"^model must have a layer of zexpert, got Linear"),
            context(nn.Linear(2, 2)),
        ):
            pass
        with pytest.raises(ValueError, match=r"^model must be a torch.nn.Module, got int$"), context(3):
            pass
        simulated = FusedMoE(4, 2, 8, 8, routing_simulation="round_robin")
        message = r"^layer '' must choose by biased_topk, got a RoutingSimulatorRouter that does not$"
        with pytest.raises(ValueError, match=message), context(simulated):
            pass
        scripted = torch.jit.script(make_layer("identity"))
        with (
            pytest.raises(ValueError, match=r"^model must not be scripted, got a script for 'runner'"),
            context(scripted),
        ):
            pass
        replaced = make_layer("identity")
        replaced.runner.router._compute_routing = lambda *_: None
        with (
            pytest.raises(ValueError, match=r"^layer '' must choose by biased_topk, got a ZeroExpertRouter that"),
            context(replaced),
        ):
            pass
    for bad in (0, True, 2.0):
        with (
            pytest.raises(ValueError, match=r"^max_tokens must be an integer of at least 1 or None, got"),
            record_choices(make_layer("identity"), bad),
        ):
            pass
    wide = FusedMoE(4, 1, 8, 8, zero_expert_type="identity", zero_expert_num=32765)
    with (
        pytest.raises(ValueError, match=r"^layer '' must have at most 32768 experts, got 32769$"),
        record_choices(wide),
    ):
        pass


def test_scripting_and_tracing_are_refused() -> None:
    layer = make_layer("identity")
    x, logits = make_inputs("identity", 3)
    record = {"": torch.tensor([[0, 1, 2]] * 3)}
    with record_choices(layer):
        with pytest.raises(RuntimeError, match=r"^a router cannot be scripted inside record_choices or replay_choices"):
            torch.jit.script(layer)
        with pytest.raises(RuntimeError, match=r"^record_choices cannot be used under torch.jit.trace without max_"):
            torch.jit.trace(layer, (x, logits))
    with (
        pytest.raises(RuntimeError, match=r"^replay_choices cannot be used under torch.jit.trace$"),
        replay_choices(layer, record),
    ):
        torch.jit.trace(layer, (x, logits))
    assert_equal(torch.jit.script(layer)(x, logits), layer(x, logits))


def test_copies_are_not_recorded() -> None:
    layer = make_layer("identity")
    x, logits = make_inputs("identity", 3)
    with record_choices(layer) as record:
        copy.deepcopy(layer)(x, logits)
    assert record[""].shape == (0, TOP_K)


# ---- torch.compile and CUDA graphs ---------------------------------------------------------------------------------


def test_compiled_with_breaks() -> None:
    """A layer that was compiled before is recorded and replayed too."""
    layer = make_layer("mixed")
    compiled = torch.compile(layer)
    x, logits = make_inputs("mixed", 6)
    expected = compiled(x, logits)
    with record_choices(layer) as record:
        assert_equal(compiled(x, logits), expected)
    assert_equal(record[""], chosen_by(layer, logits).to(torch.int16))
    other = torch.randn_like(logits)
    with replay_choices(layer, record):
        out = compiled(x, other)
    with replay_choices(layer, record):
        torch.testing.assert_close(out, layer(x, other))


def test_compiled_as_one_graph() -> None:
    layer = make_layer("mixed")
    x, logits = make_inputs("mixed", 6)
    with record_choices(layer, max_tokens=8) as record:
        torch.compile(layer, fullgraph=True)(x, logits)
        layer(x[:2], logits[:2])
    choices = chosen_by(layer, logits)
    assert_equal(record[""], torch.cat((choices, choices[:2])).to(torch.int16))
    torch.compiler.reset()
    with (
        pytest.raises(torch._dynamo.exc.Unsupported, match="record_choices without max_tokens cannot be compiled"),
        record_choices(layer),
    ):
        torch.compile(layer, fullgraph=True)(x, logits)
    torch.compiler.reset()
    with (
        pytest.raises(torch._dynamo.exc.Unsupported, match="replay_choices cannot be compiled"),
        replay_choices(layer, record),
    ):
        torch.compile(layer, fullgraph=True)(x, logits)


def test_more_tokens_than_max_tokens() -> None:
    layer = make_layer("mixed")
    x, logits = make_inputs("mixed", 6)
    with (
        pytest.raises(ValueError, match=r"^max_tokens must be at least 12, the tokens that layer '' routed, got 8$"),
        record_choices(layer, max_tokens=8) as record,
    ):
        layer(x, logits)
        layer(x, logits)
    choices = chosen_by(layer, logits).to(torch.int16)
    assert_equal(record[""], torch.cat((choices, choices[:2])))


@needs_cuda
def test_cuda_graphs() -> None:
    layer = make_layer("mixed").cuda()
    x, logits = (tensor.cuda() for tensor in make_inputs("mixed", 6))
    with torch.no_grad():
        layer(x, logits)
        graph = torch.cuda.CUDAGraph()
        with record_choices(layer, max_tokens=12) as record:
            with torch.cuda.graph(graph):
                layer(x, logits)
            graph.replay()
            first = chosen_by(layer, logits)
            logits.copy_(torch.randn_like(logits))
            graph.replay()
        assert_equal(record[""], torch.cat((first, chosen_by(layer, logits))).to(torch.int16))
        for context in (record_choices(layer), replay_choices(layer, record)):
            with (
                pytest.raises(RuntimeError, match=r"_choices cannot be captured into a CUDA graph"),
                context,
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                layer(x, logits)


# ---- What engines return -------------------------------------------------------------------------------------------


def engine_arrays(record: dict[str, Tensor], lengths: tuple[int, ...]) -> list[Any]:
    """[T, L, K] of each sequence, layer 1 being a dense one."""
    numpy = pytest.importorskip("numpy")
    first, second = (rows.split(lengths) for rows in record.values())
    dense = [torch.zeros_like(rows) for rows in first]
    stacked = [torch.stack(layers, dim=1).numpy() for layers in zip(first, dense, second, strict=True)]
    return [numpy.ascontiguousarray(array) for array in stacked]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "int64"])
def test_record_of_routed_experts(dtype: str) -> None:
    model = Model()
    record = {name: torch.rand(8, num_columns("mixed")).argsort(1)[:, :TOP_K].short() for name in ("moes.0", "moes.1")}
    record["moes.1"][3, 1] = -1
    arrays = [array.astype(dtype) for array in engine_arrays(record, (5, 3))]
    converted = record_of_routed_experts(arrays, model, layers={"moes.0": 0, "moes.1": 2})
    assert list(converted) == list(record)
    for name in record:
        assert_equal(converted[name], record[name])
    padded = record_of_routed_experts(arrays, model, layers={"moes.0": 0, "moes.1": 2}, padded_length=6)
    empty = torch.full((6, TOP_K), -1, dtype=torch.int16)
    for name in record:
        expected = torch.cat((record[name][:5], empty[:1], record[name][5:], empty[:3]))
        assert_equal(padded[name], expected)
    by_number = record_of_routed_experts([array[:, ::2] for array in arrays], model)
    assert_equal(by_number["moes.1"], record["moes.1"])
    with replay_choices(model, converted):
        model(torch.randn(8, HIDDEN))


def test_255_is_an_expert_where_there_are_more() -> None:
    router_width = 300
    layer = FusedMoE(200, 2, 8, 8, zero_expert_type="identity", zero_expert_num=router_width - 200)
    array = torch.tensor([[[255, 3]]], dtype=torch.uint8)
    assert record_of_routed_experts([array], layer, layers={"": 0})[""].tolist() == [[255, 3]]


def test_errors_of_routed_experts() -> None:
    model = Model()
    good = torch.tensor([[[0, 1, 2]] * 2] * 4)
    repeated = good.clone()
    repeated[2, 1] = torch.tensor([0, 5, 0])
    for arrays, options, message in (
        ([], {}, r"routed_experts must have at least one array, got none"),
        ([good[0]], {}, r"routed_experts\[0\] must be integers of shape .* got torch.int64 of shape \[2, 3\]"),
        ([good, good.float()], {}, r"routed_experts\[1\] must be integers of shape .* got torch.float32 of shape"),
        ([good[:, :1]], {}, r"routed_experts\[0\] must have layer 1, for 'moes.1', got 1 layers"),
        ([good[:, :, :2]], {}, r"routed_experts\[0\] must have 3 experts per token for 'moes.0', got 2"),
        ([good + 8], {}, r"routed_experts\[0\] must have experts below 10 for 'moes.0', got 10"),
        ([repeated], {}, r"routed_experts\[0\] must have an expert once per token for 'moes.1', got 0 twice: without"),
        ([good], {"padded_length": 3}, r"padded_length must be at least 4, the tokens of routed_experts\[0\], got 3"),
        ([good], {"layers": {"moes.0": 0}}, r"layers must have every layer of the model, got none for 'moes.1'"),
    ):
        with pytest.raises(ValueError, match=message):
            record_of_routed_experts(arrays, model, **options)
    with pytest.raises(ValueError, match=r"^layers must be given for layer '', because its name has no number, got N"):
        record_of_routed_experts([good], make_layer("mixed"))


def test_names_of_the_package() -> None:
    assert zexpert.record_choices is record_choices
    assert zexpert.choices.replay_choices is replay_choices


def test_routed_experts_of_sglang() -> None:
    model = Model()
    expected = torch.rand(7, 2, num_columns("mixed")).argsort(2)[:, :, :TOP_K].int()
    text = b64encode(expected.numpy().tobytes()).decode()
    array = routed_experts({"meta_info": {"routed_experts": text}}, num_layers=2, top_k=TOP_K)
    assert_equal(array, expected)
    assert_equal(record_of_routed_experts([array], model)["moes.1"], expected[:, 1].short())
    assert routed_experts({"meta_info": {"routed_experts": ""}}, num_layers=2, top_k=TOP_K).shape == (0, 2, TOP_K)
    with pytest.raises(
        ValueError, match=r'^response must have text in meta_info\["routed_experts"\], got NoneType: st'
    ):
        routed_experts({"meta_info": {}}, num_layers=2, top_k=TOP_K)
    with pytest.raises(
        ValueError, match=r"^num_layers \* top_k must divide the numbers of routed_experts \(42\), got 4 \* 3"
    ):
        routed_experts({"meta_info": {"routed_experts": text}}, num_layers=4, top_k=TOP_K)
