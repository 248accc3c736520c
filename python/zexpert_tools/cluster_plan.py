# SPDX-License-Identifier: Apache-2.0
"""Costs of expert parallelism for each rank of a cluster: bytes, times and memory, computed and simulated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MoEShape:
    """Sizes of one mixture-of-experts layer; the defaults are LongCat-Flash's (arXiv 2509.01322).

    Attributes:
        num_experts: R, real experts.
        top_k: K, slots per token, zero experts included.
        hidden_size: H.
        intermediate_size: F.
        ffn_experts: mean number of a token's slots that chose a real expert.
        num_layers: layers of the model that have such experts.
        element_size: bytes of a weight and of a row's element; 2 for bfloat16.
    """

    num_experts: int = 512
    top_k: int = 12
    hidden_size: int = 6144
    intermediate_size: int = 2048
    ffn_experts: float = 8.0
    num_layers: int = 28
    element_size: int = 2


@dataclass(frozen=True)
class Cluster:
    """Speeds of one GPU and of its links; the defaults assume an H200 node: the published speeds of
    its links in one direction, and what programs reach of its memory and arithmetic.

    Attributes:
        gpus_per_node: GPUs that NVLink connects.
        nvlink: bytes per second from a GPU to others of its node.
        network: bytes per second from a GPU to other nodes.
        latency: seconds of an exchange of no bytes.
        memory_bandwidth: bytes per second.
        matmul_rate: floating-point operations per second of the experts' products, which differ in size.
    """

    gpus_per_node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    latency: float = 20e-6
    memory_bandwidth: float = 4.0e12
    matmul_rate: float = 650e12


@dataclass(frozen=True)
class LayerPlan:
    """One layer's forward on one of `gpus` ranks, with equal numbers of tokens and experts chosen evenly.

    Attributes:
        ranks_per_token: ranks that hold an expert of a token, on average: the rows it sends, its own rank included.
        dispatch_bytes: bytes a rank sends to others' experts: rows, and their slots' ids and weights.
        combine_bytes: bytes of the sums it sends back.
        all_slots_bytes: both, if every slot, zero experts' too, were a row of its own.
        network_bytes: of dispatch and combine together, what leaves the node.
        dispatch_seconds, combine_seconds: of the exchanges.
        expert_seconds: of the experts' products, and of copying and summing rows before and after them.
        weight_bytes: the rank's experts of one layer.
        model_weight_bytes: of all layers.
        buffer_bytes: rows in memory at the same time, at most.
    """

    gpus: int
    tokens: int
    ranks_per_token: float
    dispatch_bytes: float
    combine_bytes: float
    all_slots_bytes: float
    network_bytes: float
    dispatch_seconds: float
    combine_seconds: float
    expert_seconds: float
    weight_bytes: int
    model_weight_bytes: int
    buffer_bytes: float

    @property
    def seconds(self) -> float:
        """Without overlap."""
        return self.dispatch_seconds + self.expert_seconds + self.combine_seconds

    @property
    def overlapped_seconds(self) -> float:
        """With full overlap of exchanges and products."""
        return max(self.dispatch_seconds + self.combine_seconds, self.expert_seconds)


def expected_ranks_per_token(shape: MoEShape, gpus: int) -> float:
    """Ranks that hold an expert of a token.

    With k experts of R chosen evenly and without repetition, a rank is left out with probability C(R - R / P, k) /
    C(R, k), a product of k factors. For a mean k that is no integer, some tokens have one expert more than others.
    """
    local = shape.num_experts / gpus
    whole = int(shape.ffn_experts)
    left_out = 1.0
    for chosen in range(whole):
        left_out *= max(0.0, 1.0 - local / (shape.num_experts - chosen))
    if whole < shape.ffn_experts:
        left_out *= 1.0 - (shape.ffn_experts - whole) * min(1.0, local / (shape.num_experts - whole))
    return gpus * (1.0 - left_out)


def plan_layer(gpus: int, tokens: int, shape: MoEShape | None = None, cluster: Cluster | None = None) -> LayerPlan:
    """The cost of one layer.

    Experts are chosen evenly. A token sends a row to each rank that holds one of its experts; to its own at no cost. An
    exchange lasts as long as the slower of NVLink and network, which work at the same time. Computing the products and
    reading the rank's experts overlap in part: together they last the root of the sum of their squares, which is close
    to the longer where they differ much. Each slot's row is written before them and read after them, and each row that
    is sent is read twice and written once more.

    Args:
        gpus: P, ranks that share the experts: a divisor of R, or a multiple, P / R of which have the same expert.
        tokens: on each rank.

    Raises:
        ValueError: if gpus is neither, or tokens or gpus is less than 1.
    """
    shape, cluster = shape or MoEShape(), cluster or Cluster()
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if shape.num_experts % gpus != 0 and gpus % shape.num_experts != 0:
        raise ValueError(f"gpus must divide the number of experts ({shape.num_experts}) or be a multiple, got {gpus}")
    experts = max(1, shape.num_experts // gpus)
    replicas = max(1, gpus // shape.num_experts)
    ranks_per_token = expected_ranks_per_token(shape, gpus // replicas)

    row_bytes = shape.hidden_size * shape.element_size
    slot_bytes = 8 * shape.top_k  # an int32 id and a float32 weight each
    in_node = min(gpus, cluster.gpus_per_node)
    to_others, to_other_nodes = (gpus - 1) / gpus, (gpus - in_node) / gpus
    rows = tokens * ranks_per_token

    def exchange_seconds(bytes_per_row: float) -> float:
        if gpus == 1:
            return 0.0
        nvlink_seconds = rows * (to_others - to_other_nodes) * bytes_per_row / cluster.nvlink
        network_seconds = rows * to_other_nodes * bytes_per_row / cluster.network
        return max(nvlink_seconds, network_seconds) + cluster.latency

    slots = tokens * shape.ffn_experts
    expert_values = 3 * shape.hidden_size * shape.intermediate_size
    weight_bytes = experts * expert_values * shape.element_size
    product_seconds = math.hypot(
        2 * slots * expert_values / cluster.matmul_rate,
        min(1.0, slots / experts) * weight_bytes / cluster.memory_bandwidth,
    )
    passes_seconds = (2 * slots + 3 * rows) * row_bytes / cluster.memory_bandwidth
    # Rows that came, rows by expert, gate and up, the activation, the experts' results; rows sent; sums on both sides.
    buffer_bytes = shape.element_size * (
        slots * (2 * shape.hidden_size + 3 * shape.intermediate_size) + 4 * rows * shape.hidden_size
    )
    return LayerPlan(
        gpus=gpus,
        tokens=tokens,
        ranks_per_token=ranks_per_token,
        dispatch_bytes=rows * to_others * (row_bytes + slot_bytes),
        combine_bytes=rows * to_others * row_bytes,
        all_slots_bytes=2 * tokens * shape.top_k * to_others * row_bytes,
        network_bytes=rows * to_other_nodes * (2 * row_bytes + slot_bytes),
        dispatch_seconds=exchange_seconds(row_bytes + slot_bytes),
        combine_seconds=exchange_seconds(row_bytes),
        expert_seconds=product_seconds + passes_seconds,
        weight_bytes=weight_bytes,
        model_weight_bytes=weight_bytes * shape.num_layers,
        buffer_bytes=buffer_bytes,
    )


@dataclass(frozen=True)
class SimulatedRouting:
    """Counts of random routing.

    Attributes:
        ranks_per_token: mean number of ranks that hold an expert of a token.
        busiest_rank: slots of the rank that has most, over the mean; 1 without slots.
    """

    ranks_per_token: float
    busiest_rank: float


def simulate_routing(
    gpus: int,
    tokens: int,
    shape: MoEShape | None = None,
    *,
    skew: float = 0.0,
    seed: int = 0,
    max_tokens: int = 1 << 16,
) -> SimulatedRouting:
    """Draws each token's experts without repetition and counts ranks.

    Args:
        gpus: ranks that share the experts; a divisor of R.
        tokens: on each rank. No more than max_tokens are drawn for all ranks together.
        skew: expert e is chosen with a weight of (e + 1)^-skew, the order being random; 0 is even.

    Raises:
        ValueError: if gpus is no divisor of the number of experts.
    """
    shape = shape or MoEShape()
    if gpus < 1 or shape.num_experts % gpus != 0:
        raise ValueError(f"gpus must divide the number of experts ({shape.num_experts}), got {gpus}")
    generator = torch.Generator().manual_seed(seed)
    num_tokens = min(max_tokens, tokens * gpus)
    weights = (torch.arange(shape.num_experts) + 1.0) ** -skew
    log_weights = weights.log()[torch.randperm(shape.num_experts, generator=generator)]
    whole = int(shape.ffn_experts)
    load, ranks = torch.zeros(gpus, dtype=torch.int64), 0
    for begin in range(0, num_tokens, 8192):
        size = min(8192, num_tokens - begin)
        # Gumbel noise on log weights: the largest keys are draws without repetition.
        uniform = torch.rand(size, shape.num_experts, generator=generator).clamp(min=1e-30)
        keys = log_weights - (-uniform.log()).log()
        chosen = keys.topk(min(whole + 1, shape.num_experts), dim=1).indices // (shape.num_experts // gpus)
        extra = torch.rand(size, generator=generator) < shape.ffn_experts - whole
        chosen[:, whole:][~extra] = gpus  # no rank
        hit = torch.zeros(size, gpus + 1, dtype=torch.bool).scatter_(1, chosen, True)
        ranks += int(hit[:, :gpus].sum())
        load += chosen.flatten().bincount(minlength=gpus + 1)[:gpus]
    busiest_rank = float(load.max() / load.double().mean()) if bool(load.any()) else 1.0
    return SimulatedRouting(ranks / num_tokens, busiest_rank)
