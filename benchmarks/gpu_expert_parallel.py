# SPDX-License-Identifier: Apache-2.0
"""Times expert parallelism: dispatch, experts and combine, against one device and against sending every slot.

Usage: python benchmarks/gpu_expert_parallel.py [--ranks 2] [--tokens 64,4096,16384] [--json PATH]
       python benchmarks/gpu_expert_parallel.py --device cpu --experts 16 --hidden-size 64 --intermediate-size 32 ...

Starts the ranks itself: NCCL with a GPU each, or Gloo on the CPU. The layer has LongCat-Flash's routing. "one rank" is
the whole layer on one device with one rank's tokens. "all slots" sends a row for each of a token's slots, zero experts'
to expert 0, as engines do. Each time is the slowest rank's. Bytes are what a rank sends to others, there and back. The
token rate is that of all ranks over that of one rank alone. Outputs of sampled tokens are checked against float64.
Also prints the times that zexpert_tools.cluster_plan estimates for the same sizes, from the measured rate of products.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zexpert import ExpertWeights, FusedMoE, RoutingResult
from zexpert.experts import create_experts
from zexpert.runner import DefaultMoERunner, ExpertParallelMoERunner
from zexpert.runner.expert_exchange import RaggedBatch, RaggedExchange
from zexpert_tools.benchmark import harness, machine, parse
from zexpert_tools.cluster_plan import Cluster, MoEShape, plan_layer

TOP_K = 12
CHECKED_TOKENS = 16
SMALL_BATCH = 512  # tokens to which the exchanges that send rows of a fixed number are for
GROUPED = 5 / 6  # of the rate of one large product is what products of many sizes reach
BOUNDED = ("symmetric", "fixed", "all_gather")  # exchanges with a bound on tokens


@dataclass
class Result:
    """One number of tokens per rank.

    Attributes:
        seconds: of a forward by contender.
        bytes_sent: by a rank to the others, by contender.
        token_rate: of all ranks over one rank alone, by contender.
        planned_seconds: what zexpert_tools.cluster_plan says: one after another, and overlapped.
    """

    tokens: int
    ranks: int
    seconds: dict[str, harness.Timing] = field(default_factory=dict)
    bytes_sent: dict[str, float] = field(default_factory=dict)
    token_rate: dict[str, float] = field(default_factory=dict)
    checks: dict[str, harness.ErrorCheck] = field(default_factory=dict)
    planned_seconds: list[float] = field(default_factory=list)


def make_layer(options: argparse.Namespace, device: torch.device, **arguments: Any) -> FusedMoE:
    zero_experts = options.experts // 2
    bias = 1e-3 * torch.randn(options.experts + zero_experts, generator=torch.Generator().manual_seed(0))
    return FusedMoE(
        options.experts,
        TOP_K,
        options.hidden_size,
        options.intermediate_size,
        zero_expert_type="identity",
        zero_expert_num=zero_experts,
        e_score_correction_bias=bias.to(device),
        routed_scaling_factor=6.0,
        params_dtype=options.dtype,
        device=device,
        **arguments,
    ).requires_grad_(False)


class AllSlots:
    """The layer with a row for every slot, zero experts' too: they go to expert 0 with weight 0."""

    def __init__(self, layer: FusedMoE) -> None:
        assert isinstance(layer.runner, ExpertParallelMoERunner)
        self.layer, self.runner = layer, layer.runner
        self.exchange = RaggedExchange(self.runner.group, self.runner.num_local_experts)

    def start(self, hidden_states: Tensor, router_logits: Tensor) -> tuple[RaggedBatch, RoutingResult]:
        routing = self.layer.router.select_experts(hidden_states, router_logits)
        slots = hidden_states.repeat_interleave(TOP_K, dim=0)
        weights = routing.topk_weights.reshape(-1, 1)
        one_each = RoutingResult(
            weights,
            routing.topk_ids.clamp(min=0).reshape(-1, 1),
            weights.new_zeros(len(slots)),
            weights.new_zeros(len(slots), 0),
        )
        (batch,) = self.exchange.batches(slots, one_each)
        assert isinstance(batch, RaggedBatch)
        return batch, routing

    def __call__(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        batch, routing = self.start(hidden_states, router_logits)
        batch.start_dispatch()
        batch.start_combine(self.runner._local_experts(batch.finish_dispatch(), self.layer.expert_weights()))
        rows, slot_rows = batch.finish_combine()
        slot_rows = slot_rows.reshape(-1, TOP_K)
        ones = torch.ones_like(slot_rows, dtype=torch.float32)
        return self.runner._finalize(rows, slot_rows, ones, hidden_states, routing, None, None)


def batch_bytes(batch: RaggedBatch, rank: int) -> float:
    """Bytes of rows and slots to other ranks, and of the sums sent back to them."""
    rows_in, rows_out = batch.sizes
    row_bytes = batch.hidden_states.size(1) * batch.hidden_states.element_size()
    slot_bytes = 8 * batch.routing.topk_ids.size(1)
    return (sum(rows_out) - rows_out[rank]) * (row_bytes + slot_bytes) + (sum(rows_in) - rows_in[rank]) * row_bytes


def seconds_per_call(call: Callable[[], object], repeats: int, device: torch.device, alone: bool) -> list[float]:
    """Of the slowest rank, unless it runs alone; ranks start each call together."""
    seconds = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not alone:
            dist.barrier()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor(time.perf_counter() - begin, device=device, dtype=torch.float64)
        if not alone:
            dist.all_reduce(took, dist.ReduceOp.MAX)
        seconds.append(float(took))
    return seconds[2:]


def reference(routing: RoutingResult, hidden_states: Tensor, w13: Tensor, w2: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer token by token in `dtype`, with plain PyTorch, from its routing."""
    out = routing.zero_weight[:, None].to(dtype) * hidden_states.to(dtype)
    for token, ids in enumerate(routing.topk_ids.tolist()):
        for k, expert in enumerate(ids):
            if expert >= 0:
                gate, up = F.linear(hidden_states[token].to(dtype), w13[expert].to(dtype)).chunk(2)
                row = F.linear(F.silu(gate) * up, w2[expert].to(dtype))
                out[token] += routing.topk_weights[token, k].to(dtype) * row
    return out


def run_alone(
    parallel: FusedMoE,
    inputs: tuple[Tensor, Tensor],
    sampled: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[harness.Timing, Tensor, Tensor] | None:
    """On rank 0, the whole layer's time, and the sampled tokens' outputs in float64 and in the layer's dtype."""
    state = parallel.state_dict()
    w13, w2 = state["w13_weight"].full_tensor(), state["w2_weight"].full_tensor()
    if dist.get_rank() > 0:
        return None
    one = DefaultMoERunner(parallel.router, create_experts())
    seconds = seconds_per_call(lambda: one(*inputs, ExpertWeights(w13, w2)), options.repeats, device, alone=True)
    hidden_states, router_logits = (tensor[sampled] for tensor in inputs)
    routing = parallel.router.select_experts(hidden_states, router_logits)
    expected, plain = (reference(routing, hidden_states, w13, w2, dtype) for dtype in (torch.float64, options.dtype))
    return harness.Timing.of(seconds), expected, plain


def run_case(options: argparse.Namespace, num_tokens: int, device: torch.device, rate: float) -> Result:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    parallel = make_layer(options, device, expert_parallel_group=dist.group.WORLD)
    torch.manual_seed(0)
    in_chunks = make_layer(options, device, expert_parallel_group=dist.group.WORLD, chunk_size=-(-num_tokens // 4))
    in_chunks.w13_weight, in_chunks.w2_weight = parallel.w13_weight, parallel.w2_weight
    generator = torch.Generator(device).manual_seed(1 + rank)
    hidden_states = torch.randn(num_tokens, options.hidden_size, device=device, generator=generator).to(options.dtype)
    router_logits = torch.randn(num_tokens, options.experts * 3 // 2, device=device, generator=generator)
    inputs = hidden_states, router_logits

    result = Result(num_tokens, num_ranks)
    runner = parallel.runner
    assert isinstance(runner, ExpertParallelMoERunner)
    all_slots = AllSlots(parallel)
    contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "symmetric": parallel,
        "ragged": parallel,
        "ragged, 4 chunks": in_chunks,
        "all slots": all_slots,
    }
    if num_tokens <= SMALL_BATCH:
        contenders |= {"fixed": parallel, "all_gather": parallel}

    routing_of = parallel.router.select_experts
    sampled = torch.linspace(0, num_tokens - 1, min(num_tokens, CHECKED_TOKENS), device=device).long().unique()
    alone = run_alone(parallel, inputs, sampled, options, device)
    if alone is not None:
        result.seconds["one rank"], expected, plain = alone
    for name, contender in contenders.items():
        runner.use_exchange(*((name, num_tokens) if name in BOUNDED else ("ragged",)))
        out = contender(*inputs)
        if alone is not None:
            result.checks[name] = harness.check_error(out[sampled], plain, expected)
        seconds = seconds_per_call(lambda run=contender: run(*inputs), options.repeats, device, alone=False)  # type: ignore[misc]
        result.seconds[name] = harness.Timing.of(seconds)
        if alone is not None:
            result.token_rate[name] = num_ranks * result.seconds["one rank"].median / result.seconds[name].median
    runner.use_exchange("ragged")
    (batch,) = runner.exchange.batches(hidden_states, routing_of(*inputs))
    assert isinstance(batch, RaggedBatch)
    result.bytes_sent = {
        "symmetric": batch_bytes(batch, rank),
        "ragged": batch_bytes(batch, rank),
        "all slots": batch_bytes(all_slots.start(*inputs)[0], rank),
    }
    ffn_experts = TOP_K * 2 / 3  # logits are even
    shape = MoEShape(options.experts, TOP_K, options.hidden_size, options.intermediate_size, ffn_experts)
    plan = plan_layer(num_ranks, num_tokens, shape, Cluster(gpus_per_node=num_ranks, matmul_rate=GROUPED * rate))
    result.planned_seconds = [plan.seconds, plan.overlapped_seconds]
    return result


def print_result(result: Result) -> None:
    rows = [
        [
            name,
            harness.format_seconds(timing.median),
            f"{result.bytes_sent[name] / 1e6:.1f} MB" if name in result.bytes_sent else "",
            f"{result.token_rate[name]:.2f}x" if name in result.token_rate else "",
            {True: "", False: "WRONG"}[result.checks[name].passed] if name in result.checks else "",
        ]
        for name, timing in result.seconds.items()
    ]
    print(f"\n{result.tokens} tokens on each of {result.ranks} ranks")
    print(harness.format_table(["", "time", "sent", "token rate", ""], rows))
    planned, overlapped = (harness.format_seconds(seconds) for seconds in result.planned_seconds)
    print(f"the plan says {planned}, {overlapped} with full overlap", flush=True)


def run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=options.ranks,
        device_id=device if device.type == "cuda" else None,
    )
    size = 8192 if device.type == "cuda" else 256
    a = torch.randn(size, size, device=device).to(options.dtype)
    rate = 2 * size**3 / min(seconds_per_call(lambda: a @ a, 5, device, alone=True))
    results = []
    with torch.no_grad():
        for num_tokens in options.tokens:
            results.append(run_case(options, num_tokens, device, rate))
            if rank == 0:
                print_result(results[-1])
    if rank == 0:
        report = {
            "benchmark": "gpu_expert_parallel",
            "environment": machine.environment(),
            "matmul_rate": rate,
            "results": [asdict(result) for result in results],
        }
        Path(folder, "report.json").write_text(json.dumps(report, indent=2) + "\n")
    dist.destroy_process_group()
    gc.collect()  # free the groups: their threads must end before Python does


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=parse.positive_ints, default=[64, 256, 4096, 16384], help="on each rank")
    parser.add_argument("--experts", type=int, default=512, help="real ones; half as many identity experts join them")
    parser.add_argument("--hidden-size", type=int, default=6144)
    parser.add_argument("--intermediate-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    if options.ranks < 1 or options.repeats < 1:
        parser.error("--ranks and --repeats must be at least 1")
    if options.experts % (2 * options.ranks) != 0:
        parser.error(f"--experts must be a multiple of twice the ranks, got {options.experts}")
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        parser.error(f"--ranks {options.ranks} needs as many GPUs, and there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, args=(options, folder), nprocs=options.ranks)
        report = Path(folder, "report.json").read_text()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(report)
        print(f"\nwritten: {options.json}")
    checks = [check for result in json.loads(report)["results"] for check in result["checks"].values()]
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
