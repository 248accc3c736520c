# SPDX-License-Identifier: Apache-2.0
"""`zexpert plan`: what LongCat-Flash's experts cost on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from zexpert_tools.cli.terminal import console, parse_positive_ints, print_table
from zexpert_tools.cluster_plan import Cluster, LayerPlan, MoEShape, plan_layer, simulate_routing

DEFAULT_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def plan(
    gpus: Annotated[
        str | None, typer.Option(help="Numbers of GPUs that share the experts, such as 8,64; 8 to 1024 without it.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens on each GPU.")] = 4096,
    ffn_experts: Annotated[float, typer.Option(min=0.0, max=12.0, help="Mean slots of a token that do work.")] = 8.0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that NVLink connects.")] = 8,
    nvlink: Annotated[float, typer.Option(min=0.001, help="GB/s from a GPU to others of its node.")] = 450.0,
    network: Annotated[float, typer.Option(min=0.001, help="GB/s from a GPU to other nodes.")] = 50.0,
    latency: Annotated[float, typer.Option(min=0.0, help="Microseconds of an exchange of nothing.")] = 20.0,
    memory: Annotated[float, typer.Option(min=0.001, help="TB/s of a GPU's memory.")] = 4.0,
    matmul: Annotated[float, typer.Option(min=0.001, help="TFLOP/s of the experts' products.")] = 650.0,
) -> None:
    """Estimate bytes, times and memory of LongCat-Flash's experts spread over a cluster."""
    cluster = Cluster(gpus_per_node, nvlink * 1e9, network * 1e9, latency * 1e-6, memory * 1e12, matmul * 1e12)
    numbers = DEFAULT_GPUS if gpus is None else parse_positive_ints("--gpus", gpus)
    show_plan(console, numbers, tokens, MoEShape(ffn_experts=ffn_experts), cluster)


def show_plan(console: Console, gpus: Sequence[int], tokens: int, shape: MoEShape, cluster: Cluster) -> None:
    """Prints what one layer's forward costs a rank for each number of GPUs.

    Raises:
        ValueError: as plan_layer does.
    """
    plans = [plan_layer(each, tokens, shape, cluster) for each in gpus]
    console.print(
        f"LongCat-Flash: {shape.num_experts} experts of {shape.hidden_size} x {shape.intermediate_size}, "
        f"{shape.top_k} slots per token, {shape.ffn_experts:g} of them with work; {tokens} tokens per GPU; bfloat16",
        highlight=False,
    )
    console.print(
        f"Assumed: {cluster.gpus_per_node} GPUs per node, NVLink {cluster.nvlink / 1e9:g} GB/s and network "
        f"{cluster.network / 1e9:g} GB/s per GPU and direction, {cluster.latency * 1e6:g} us per exchange, memory "
        f"{cluster.memory_bandwidth / 1e12:g} TB/s, products {cluster.matmul_rate / 1e12:g} TFLOP/s",
        highlight=False,
    )
    rows = [times_row(plan) for plan in plans]
    memory = [memory_row(plan, shape) for plan in plans]
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
        "Forward of one layer, per GPU: bytes": (
            ("GPUs", "rows per token", "sent", "all slots", "over network"),
            [row[:5] for row in rows],
        ),
        "Forward of one layer, per GPU: times": (
            ("GPUs", "exchange", "experts", "sum", "overlapped"),
            [row[:1] + row[5:] for row in rows],
        ),
        "Memory per GPU": (
            ("GPUs", "experts, layer", "experts, model", "rows"),
            [row[:4] for row in memory],
        ),
        "Simulated routing": (
            ("GPUs", "rows per token", "busiest GPU"),
            [row[:1] + row[4:] for row in memory],
        ),
    }
    for title, (headings, lines) in tables.items():
        table = Table()
        for heading in headings:
            table.add_column(heading, justify="right")
        for line in lines:
            table.add_row(*line)
        print_table(console, title, table)


def times_row(plan: LayerPlan) -> list[str]:
    """A line of the first two tables."""
    return [
        str(plan.gpus),
        f"{plan.ranks_per_token:.2f}",
        f"{(plan.dispatch_bytes + plan.combine_bytes) / 1e6:,.1f} MB",
        f"{plan.all_slots_bytes / 1e6:,.1f} MB",
        f"{plan.network_bytes / 1e6:,.1f} MB",
        f"{(plan.dispatch_seconds + plan.combine_seconds) * 1e3:.3f} ms",
        f"{plan.expert_seconds * 1e3:.3f} ms",
        f"{plan.seconds * 1e3:.3f} ms",
        f"{plan.overlapped_seconds * 1e3:.3f} ms",
    ]


def memory_row(plan: LayerPlan, shape: MoEShape) -> list[str]:
    """A line of the last two tables."""
    simulated = simulate_routing(min(plan.gpus, shape.num_experts), plan.tokens, shape)
    return [
        str(plan.gpus),
        f"{plan.weight_bytes / 1e9:.2f} GB",
        f"{plan.model_weight_bytes / 1e9:.1f} GB",
        f"{plan.buffer_bytes / 1e9:.2f} GB",
        f"{simulated.ranks_per_token:.2f}",
        f"{simulated.busiest_rank:.2f}x mean",
    ]
