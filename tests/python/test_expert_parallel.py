# SPDX-License-Identifier: Apache-2.0
"""Experts spread over ranks: several processes do what one does with all their tokens."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from layer_cases import HIDDEN, LAYERS, SharedExperts
from parallel_cases import (
    EXCHANGES,
    NUM_EXPERTS,
    NUM_TOKENS,
    TOP_K,
    assert_as_one_process,
    make_inputs,
    make_layer,
    make_parallel,
    results,
    runner_of,
    share_of,
)
from ranks import Ranks
from testing import assert_equal, assert_error_rule
from zexpert import FusedMoE
from zexpert.runner.expert_exchange import RaggedBatch
from zexpert.runner.shared_memory import shared_memories
from zexpert.telemetry import collect_routing_stats, track_routing

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def compare_kinds(group: Any, exchange: str) -> None:
    for kind in LAYERS:
        assert_as_one_process(group, kind, exchange, torch.float32)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_as_one_process(num_ranks: int, exchange: str, ranks: Ranks) -> None:
    """Rank 1 has no token."""
    ranks.run(compare_kinds, num_ranks, exchange)


@pytest.mark.parametrize("case", ["one expert", "only zero experts"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_extreme_routing(exchange: str, case: str, ranks: Ranks) -> None:
    ranks.run(assert_as_one_process, 3, "identity", exchange, torch.float32, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_dtypes(exchange: str, dtype: torch.dtype, ranks: Ranks) -> None:
    ranks.run(assert_as_one_process, 3, "mixed", exchange, dtype)


def compare_backends(group: Any) -> None:
    for backend in ("cpu", "torch"):
        for case in ("random", "one expert", "only zero experts"):
            for exchange in EXCHANGES:
                assert_as_one_process(group, "identity", exchange, torch.float32, case, experts_backend=backend)


def test_experts_backends(ranks: Ranks) -> None:
    ranks.run(compare_backends, 3)


def compare_recomputing(group: Any) -> None:
    for exchange in EXCHANGES:
        assert_as_one_process(group, "mixed", exchange, torch.float32, recompute=True)


def test_recompute(ranks: Ranks) -> None:
    ranks.run(compare_recomputing, 3)


def one_weight_wants_gradients(group: Any) -> None:
    """All of the work is on rank 0, and every rank runs the same backward."""
    inputs = make_inputs("identity", 5, "one expert")
    for frozen in ("w13_weight", "w2_weight"):
        layer = make_parallel("identity", "ragged", group, experts_backend="torch")
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.startswith("w") and name != frozen)
        out = layer(*(tensor.float() for tensor in inputs[:2]))
        out.backward(inputs[2].float())
        wanted = layer.get_parameter("w2_weight" if frozen == "w13_weight" else "w13_weight")
        assert wanted.grad is not None
        assert bool(wanted.grad.any()) == (dist.get_rank(group) == 0)


def test_gradients_of_one_weight(ranks: Ranks) -> None:
    ranks.run(one_weight_wants_gradients, 2)


def gradients_where_wanted(group: Any, exchange: str, num_tokens: int) -> Tensor | None:
    """Rank 1 makes hidden states and logits of its own, and its weights are frozen."""
    layer = make_parallel("identity", exchange, group)
    rank = dist.get_rank(group)
    num_tokens = 7 if rank == 0 else num_tokens
    hidden_states, logits, _ = make_inputs("identity", num_tokens)
    x, router_logits = hidden_states.float(), logits.float()
    if rank == 0:
        x.requires_grad_()
        router_logits.requires_grad_()
    else:
        layer.requires_grad_(False)
    out = layer(x, router_logits)
    assert out.requires_grad
    out.square().sum().backward()
    dist.barrier(group=group)
    return x.grad


@pytest.mark.parametrize("num_tokens", [0, 5])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_without_gradients_join_the_backward(exchange: str, num_tokens: int, ranks: Ranks) -> None:
    actual, nothing = ranks.run(gradients_where_wanted, 2, exchange, num_tokens)
    assert nothing is None
    hidden_states, logits, _ = make_inputs("identity", 7)
    x = hidden_states.float().requires_grad_()
    make_layer("identity")(x, logits.float()).square().sum().backward()
    torch.testing.assert_close(actual, x.grad)


def inference(group: Any) -> None:
    layer = make_parallel("identity", "ragged", group)
    inputs = [tensor.float() for tensor in make_inputs("identity", 7)[:2]]
    with torch.no_grad():
        assert not layer(*inputs).requires_grad
    with torch.inference_mode():
        assert layer(*inputs).is_inference()


def test_inference_keeps_no_graph(ranks: Ranks) -> None:
    ranks.run(inference, 2)


# --- Exactly


def whole_slots_on_one_rank(group: Any) -> None:
    """Where one rank has all of a token's experts, the order of the sum is one process's, and so is every bit."""
    rank = dist.get_rank(group)
    hidden_states, logits, _ = make_inputs("identity", 40)
    for token in range(40):
        outside = torch.ones(NUM_EXPERTS, dtype=torch.bool)
        first = 6 * (token % 2)
        outside[first : first + 6] = False
        logits[token, :NUM_EXPERTS][outside] = -torch.inf
    one = make_layer("identity")
    share = slice(0, 17) if rank == 0 else slice(17, None)
    with torch.no_grad():
        # Of the rank's tokens alone: a library's product, as shared experts are, may depend on the number of rows.
        expected = one(hidden_states[share].float(), logits[share].float())
        for exchange in ("ragged", "ragged in chunks", "fixed"):
            layer = make_parallel("identity", exchange, group)
            if exchange == "fixed":
                runner_of(layer).use_exchange("fixed", max_tokens=40)
            assert_equal(layer(hidden_states[share].float(), logits[share].float()), expected, exchange)


def test_one_process_bit_for_bit_where_the_order_is_the_same(ranks: Ranks) -> None:
    ranks.run(whole_slots_on_one_rank, 2)


def repeat(group: Any) -> None:
    inputs = make_inputs("mixed", NUM_TOKENS[dist.get_rank(group)])
    for exchange in EXCHANGES:
        layer = make_parallel("mixed", exchange, group)
        first = results(layer, *inputs)
        for name, value in results(layer, *inputs).items():
            assert_equal(value, first[name], f"{exchange}: {name}")


def test_repeatable(ranks: Ranks) -> None:
    ranks.run(repeat, 3)


def with_rubbish(group: Any) -> None:
    layer = make_parallel("mixed", "symmetric", group)
    inputs = make_inputs("mixed", NUM_TOKENS[dist.get_rank(group)])
    first = results(layer, *inputs)
    memories = shared_memories(runner_of(layer).group)
    assert memories
    for memory in memories:
        for arrays in (memory.rows, memory.sums, memory.weights, memory.weight_sums):
            memory.own(arrays).fill_(torch.nan)
        memory.own(memory.ids).fill_(1 << 30)
    dist.barrier(group=group)
    for name, value in results(layer, *inputs).items():
        assert_equal(value, first[name], name)


def test_what_shared_memory_held_before_does_not_matter(ranks: Ranks) -> None:
    ranks.run(with_rubbish, 3)


def memories_end(group: Any) -> None:
    own = dist.new_group(
        list(range(2))
    )  # by all ranks: each counts the groups, and later ones are found by their number
    if dist.get_rank(group) >= 2:
        return
    layers = [FusedMoE(NUM_EXPERTS, TOP_K, HIDDEN, 8, expert_parallel_group=own) for _ in range(2)]
    for layer in layers:
        runner_of(layer).use_exchange("symmetric", 5)
        layer(torch.zeros(3, HIDDEN), torch.zeros(3, NUM_EXPERTS))
    (memory,) = shared_memories(runner_of(layers[0]).group)
    left = weakref.ref(memory)
    del memory, layers, layer
    dist.destroy_process_group(own)
    del own
    gc.collect()
    assert left() is None


def test_shared_memory_is_one_for_all_layers_and_ends_with_the_group(ranks: Ranks) -> None:
    ranks.run(memories_end, 4)


def nothing_at_all(group: Any) -> None:
    for exchange in EXCHANGES:
        out = results(make_parallel("mixed", exchange, group), *make_inputs("mixed", 0))
        assert out["out"].shape == (0, HIDDEN)
        assert float(out["w13_weight"].abs().max()) == 0.0


def test_no_tokens_anywhere(ranks: Ranks) -> None:
    ranks.run(nothing_at_all, 3)


# --- What is sent


def rows_sent(group: Any) -> list[int]:
    """Rows of this rank's tokens by destination; checks them against the routing."""
    layer = make_parallel("identity", "ragged", group)
    hidden_states, logits, _ = make_inputs("identity", 9 + dist.get_rank(group))
    with torch.no_grad():
        routing = layer.router.select_experts(hidden_states.float(), logits.float())
        (batch,) = runner_of(layer).exchange.batches(hidden_states.float(), routing)
    assert isinstance(batch, RaggedBatch)
    num_ranks = dist.get_world_size(group)
    owners = [{int(e) // (NUM_EXPERTS // num_ranks) for e in ids if e >= 0} for ids in routing.topk_ids]
    assert batch.sizes[1] == [sum(rank in ranks for ranks in owners) for rank in range(num_ranks)]
    assert sum(batch.sizes[1]) < int((routing.topk_ids >= 0).sum()) < routing.topk_ids.numel()
    return batch.sizes[1]


def test_a_row_goes_once_to_each_rank_and_zero_slots_never(ranks: Ranks) -> None:
    assert all(max(sent) > 0 for sent in ranks.run(rows_sent, 3))


def nothing_sent(group: Any) -> None:
    layer = make_parallel("identity", "ragged", group)
    hidden_states, logits, _ = make_inputs("identity", 9, "only zero experts")
    routing = layer.router.select_experts(hidden_states, logits)
    (batch,) = runner_of(layer).exchange.batches(hidden_states, routing)
    assert isinstance(batch, RaggedBatch)
    assert batch.sizes == ([0, 0], [0, 0])


def test_only_zero_experts_send_nothing(ranks: Ranks) -> None:
    ranks.run(nothing_sent, 2)


def order_of_events(group: Any) -> list[str]:
    events: list[str] = []
    start, shared = dist.all_to_all_single, SharedExperts.forward

    def started(*args: Any, **kwargs: Any) -> Any:
        work = start(*args, **kwargs)
        if not kwargs.get("async_op"):
            return work
        events.append("start")
        wait = work.wait
        events_of = type("Work", (), {"wait": lambda _: (events.append("wait"), wait())[1]})
        return events_of()

    def computed(module: SharedExperts, hidden_states: Tensor) -> Tensor:
        events.append("shared experts")
        return shared(module, hidden_states)

    dist.all_to_all_single, SharedExperts.forward = started, computed  # type: ignore[assignment, method-assign]
    try:
        hidden_states, logits, _ = make_inputs("plain", 25)
        with torch.no_grad():
            make_parallel("plain", "ragged", group)(hidden_states.float(), logits.float())
            events.append("in chunks")
            make_parallel("plain", "ragged in chunks", group)(hidden_states.float(), logits.float())
    finally:
        dist.all_to_all_single, SharedExperts.forward = start, shared  # type: ignore[method-assign]
    return events


def test_work_is_done_while_rows_are_under_way(ranks: Ranks) -> None:
    """Two collectives, rows and their slots, go out; the sums come back in one."""
    out, back = ["start", "start"], ["start"]
    whole = [*out, "shared experts", "wait", "wait", *back, "wait"]
    # The second chunk is under way before the first one's experts start, the first one's sums before the second's.
    chunks = [*out, "shared experts", *out, "wait", "wait", *back, "wait", "wait", *back, "wait", "wait"]
    for events in ranks.run(order_of_events, 2):
        assert events == [*whole, "in chunks", *chunks]


def rows_alive(group: Any) -> list[int]:
    """Batches with rows in memory, at the end of each."""
    layer = make_parallel("identity", "ragged in chunks", group)
    runner, batches, alive = runner_of(layer), [], []
    output = runner._output

    def counted(batch: RaggedBatch, *others: Any) -> Tensor:
        batches.append(weakref.ref(batch))
        out = output(batch, *others)
        alive.append(sum(each() is not None for each in batches))
        return out

    runner._output = counted  # type: ignore[assignment, method-assign]
    with torch.no_grad():
        layer(*(tensor.float() for tensor in make_inputs("identity", 90)[:2]))
    return alive


def test_a_chunk_leaves_no_rows_behind(ranks: Ranks) -> None:
    assert ranks.run(rows_alive, 2) == [[1] * 5] * 2


# --- Replicas, telemetry


def replicated(group: Any) -> None:
    """16 physical experts: experts 0 to 3 have a second replica each."""
    replicas = torch.full((NUM_EXPERTS, 2), -1)
    replicas[:, 0] = torch.tensor([15, 3, 8, 1, 0, 12, 2, 9, 7, 4, 11, 5])
    replicas[:4, 1] = torch.tensor([6, 10, 13, 14])
    layer = make_layer("identity", expert_parallel_group=group, logical_to_physical_map=replicas)
    assert layer.w13_weight.size(0) == 16 // dist.get_world_size(group)
    track_routing(layer)
    rank = dist.get_rank(group)
    inputs = make_inputs("identity", sum(NUM_TOKENS[: dist.get_world_size(group)]))
    share = share_of(rank)
    with torch.no_grad():
        actual = layer(*(tensor[share].float() for tensor in inputs[:2]))
        plain = make_layer("identity", experts_backend="torch")(*(tensor.float() for tensor in inputs[:2]))
        expected = make_layer("identity", torch.float64, experts_backend="torch")(*inputs[:2])
    assert_error_rule(actual, plain[share], expected[share])
    load = layer.router.expert_load
    assert load is not None
    assert_equal(collect_routing_stats(layer)[""].expert_load, load, "load by the telemetry")
    dist.all_reduce(load, group=group)
    logical = layer.router._compute_routing(*(tensor.float() for tensor in inputs[:2])).topk_ids
    counts = logical[logical >= 0].long().bincount(minlength=NUM_EXPERTS)
    replica_load = torch.where(replicas >= 0, load[replicas], 0)
    assert_equal(replica_load.sum(dim=1), counts, "load of all replicas")
    assert bool((replica_load[:4] > 0).all(dim=1).any()), "no expert's load is shared by its replicas"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_redundant_experts(num_ranks: int, ranks: Ranks) -> None:
    ranks.run(replicated, num_ranks)


def drawn(group: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    replicas = torch.arange(NUM_EXPERTS)[:, None].repeat(1, 2)
    replicas[:, 1] = 23 - replicas[:, 0]
    layer = FusedMoE(NUM_EXPERTS, TOP_K, 8, 4, expert_parallel_group=group, logical_to_physical_map=replicas)
    return {name: tensor.full_tensor() for name, tensor in layer.state_dict().items()}


def test_parameters_do_not_depend_on_the_number_of_ranks(ranks: Ranks) -> None:
    two, four = ranks.run(drawn, 2)[0], ranks.run(drawn, 4)[0]
    for name, weight in two.items():
        assert_equal(weight, four[name], name)
        assert_equal(weight, weight.flip(0), f"{name} of replicas")
        assert len(weight[:NUM_EXPERTS].flatten(1).unique(dim=0)) == NUM_EXPERTS
