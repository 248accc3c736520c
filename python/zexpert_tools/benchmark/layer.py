# SPDX-License-Identifier: Apache-2.0
"""Times the layer, forward or a training step: zexpert, torch operations, and transformers where it has the layer."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zexpert.layer import FusedMoE
from zexpert.models.float32_linear import float32_linear
from zexpert_tools.benchmark import harness, machine, plain_moe, rates, torch_routing
from zexpert_tools.benchmark.timing import Timing
from zexpert_tools.benchmark.torch_routing import RoutingCase

SUBJECT = "zexpert"
CHECKED_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """A layer: its routing, H and F."""

    routing: RoutingCase
    hidden_size: int
    intermediate_size: int

    @property
    def values_per_expert(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights of all experts."""
        return self.routing.num_real_experts * self.values_per_expert * dtype.itemsize


SMALL = Shape(RoutingCase("small", 64, 32, 0, 12, has_bias=True, routed_scaling_factor=6.0), 1024, 512)

#: By the names of `zexpert bench --model`.
MODELS = {
    "small": SMALL,
    "longcat-flash": Shape(torch_routing.LONGCAT_FLASH, 6144, 2048),
    "lite": Shape(RoutingCase("LongCat-Flash-Lite", 256, 128, 0, 12, has_bias=True), 3072, 1024),
    "qwen3-zeda": Shape(torch_routing.ZEDA_QWEN3, 2048, 768),
    "glm-zeda": Shape(torch_routing.ZEDA_GLM, 2048, 1536),
    "deepseek-v3": Shape(torch_routing.DEEPSEEK_V3, 7168, 2048),
}


@dataclass(frozen=True)
class Weights:
    """One layer's parameters. w13 has rows for all experts, as transformers keeps it; zexpert reads the real ones."""

    classifier: Tensor  # [N, H]
    bias: Tensor | None  # [N], float32
    all_w13: Tensor  # [R or N, 2F, H]
    w2: Tensor  # [R, H, F]

    @property
    def w13(self) -> Tensor:
        """[R, 2F, H]."""
        return self.all_w13[: self.w2.size(0)]


def make_weights(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0, unused: bool = False
) -> Weights:
    """Random weights; with `unused`, w13 has transformers' rows for zero experts."""
    generator = torch.Generator(device).manual_seed(seed)
    routing, hidden_size, num_real = shape.routing, shape.hidden_size, shape.routing.num_real_experts

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(std=sizes[-1] ** -0.5, generator=generator)

    num_rows = routing.num_experts if unused else num_real
    w13 = torch.empty(num_rows, 2 * shape.intermediate_size, hidden_size, dtype=dtype, device=device)
    w13[:num_real].normal_(std=hidden_size**-0.5, generator=generator)
    scale = 1e-3 if routing.scoring_func == "softmax" else 1e-1
    bias = torch.randn(routing.num_experts, device=device, generator=generator) * scale if routing.has_bias else None
    return Weights(
        classifier=normal(routing.num_experts, hidden_size),
        bias=bias,
        all_w13=w13,
        w2=normal(num_real, hidden_size, shape.intermediate_size),
    )


Run = Callable[[int], Tensor]
"""A contender: from the index of an input to its result."""
Projection = Callable[[Tensor, Weights], Tensor]
"""From hidden states [T, H] to logits [T, N]."""


def router_logits(hidden_states: Tensor, weights: Weights) -> Tensor:
    """The router's projection by PyTorch in float32, as the peers compute it; in float64 for float64."""
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    return F.linear(hidden_states.to(dtype), weights.classifier.to(dtype))


def zexpert_router_logits(hidden_states: Tensor, weights: Weights) -> Tensor:
    """The router's projection by zexpert."""
    return float32_linear(hidden_states, weights.classifier)


# ---- Contenders ------------------------------------------------------------------------------------------------------


def zexpert_layer(shape: Shape, weights: Weights, *, training: bool = False) -> FusedMoE:
    """FusedMoE around the same tensors."""
    routing = shape.routing
    zero_experts = {"identity": routing.num_identity_experts, "drop": routing.num_drop_experts}
    layer = FusedMoE(
        routing.num_real_experts,
        routing.top_k,
        shape.hidden_size,
        shape.intermediate_size,
        zero_expert_type=zero_experts if any(zero_experts.values()) else None,
        e_score_correction_bias=weights.bias,
        scoring_func=routing.scoring_func,
        renormalize=routing.renormalize,
        routed_scaling_factor=routing.routed_scaling_factor,
        use_grouped_topk=routing.num_expert_group > 1,
        num_expert_group=routing.num_expert_group if routing.num_expert_group > 1 else None,
        topk_group=routing.topk_group if routing.num_expert_group > 1 else None,
        params_dtype=weights.w2.dtype,
        device="meta",
    )
    layer.w13_weight = nn.Parameter(weights.w13, requires_grad=training)
    layer.w2_weight = nn.Parameter(weights.w2, requires_grad=training)
    return layer


class PlainLayer(nn.Module):
    """plain_moe's layer: a loop over the experts that have tokens."""

    def __init__(self, shape: Shape, weights: Weights, *, training: bool = False) -> None:
        super().__init__()
        self.routing, self.bias = shape.routing, weights.bias
        self.w13_weight = nn.Parameter(weights.w13, requires_grad=training)
        self.w2_weight = nn.Parameter(weights.w2, requires_grad=training)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(router_logits.dtype)
        routing = torch_routing.route(router_logits, bias, self.routing)
        return plain_moe.experts_and_sum(hidden_states, *routing, self.w13_weight, self.w2_weight)


class GroupedMMLayer(PlainLayer):
    """Slots sorted by expert, those of zero experts left out, and torch's grouped matrix product: waits for no host."""

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        num_experts, top_k = self.routing.num_real_experts, self.routing.top_k
        topk_weights, topk_ids, zero_weight = torch_routing.route(router_logits, self.bias, self.routing)
        slot_experts = torch.where(topk_ids < 0, num_experts, topk_ids).flatten()
        sorted_experts, order = slot_experts.sort()
        experts = torch.arange(num_experts, device=order.device, dtype=sorted_experts.dtype)
        ends = torch.searchsorted(sorted_experts, experts, right=True).int()
        rows = hidden_states[order // top_k]
        gate, up = torch._grouped_mm(rows, self.w13_weight.transpose(1, 2), ends).chunk(2, dim=1)
        rows = torch._grouped_mm(F.silu(gate) * up, self.w2_weight.transpose(1, 2), ends)
        in_slot_order = torch.empty_like(rows)
        in_slot_order[order] = rows
        by_slot = in_slot_order.reshape(-1, top_k, rows.shape[1])
        by_slot = torch.where((topk_ids < 0)[:, :, None], 0.0, by_slot)
        summed = torch.einsum("tk,tkh->th", topk_weights.to(rows.dtype), by_slot)
        return summed + zero_weight[:, None].to(rows.dtype) * hidden_states


def transformers_layer(shape: Shape, weights: Weights, *, training: bool = False) -> nn.Module:
    """transformers' LongcatFlashMoE around the same tensors, router included. ImportError where it is not installed."""
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    config = LongcatFlashConfig(
        hidden_size=shape.hidden_size,
        expert_ffn_hidden_size=shape.intermediate_size,
        n_routed_experts=shape.routing.num_real_experts,
        zero_expert_num=shape.routing.num_identity_experts,
        moe_topk=shape.routing.top_k,
        routed_scaling_factor=shape.routing.routed_scaling_factor,
    )
    with torch.device("meta"):
        layer: nn.Module = LongcatFlashMoE(config)
    state = {
        "router.classifier.weight": weights.classifier,
        "router.e_score_correction_bias": weights.bias,
        "experts.gate_up_proj": weights.all_w13,
        "experts.down_proj": weights.w2,
    }
    layer.load_state_dict({name: tensor.detach() for name, tensor in state.items() if tensor is not None}, assign=True)
    layer.eval().requires_grad_(False)
    layer.get_submodule("experts").requires_grad_(training)
    return layer


def transformers_has(routing: RoutingCase) -> bool:
    """Whether LongcatFlashMoE is this layer."""
    plain = not routing.renormalize and routing.num_expert_group == 1 and routing.num_drop_experts == 0
    return routing.scoring_func == "softmax" and routing.has_bias and plain


# ---- One case --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class LayerResult(harness.CaseResult):
    """A case with the figures of the roofline."""

    name: str
    num_tokens: int
    operations: float
    num_bytes: float

    def as_json(self) -> dict[str, Any]:
        sizes = {"model": self.name, "tokens": self.num_tokens}
        return {**super().as_json(), **sizes, "operations": self.operations, "bytes": self.num_bytes}

    @classmethod
    def from_json(cls, result: Mapping[str, Any]) -> LayerResult:
        """The inverse of as_json, without the target."""
        return cls(
            case=result["case"],
            subject=result["subject"],
            floor=result["floor_s"],
            timings={name: Timing(**timing) for name, timing in result["timings_s"].items()},
            checks={name: harness.ErrorCheck(**check) for name, check in result["checks"].items()},
            other_load=result["other_load"],
            name=result["model"],
            num_tokens=result["tokens"],
            operations=result["operations"],
            num_bytes=result["bytes"],
        )


def run_case(
    shape: Shape,
    num_tokens: int,
    weights: Sequence[Weights],
    *,
    limits: rates.Limits,
    repeats: int,
    training: bool = False,
    router_projection: bool = True,
    peers: Mapping[str, Callable[..., nn.Module]] | None = None,
    target: harness.Target | None = None,
    say: Callable[[str], object] = print,
) -> LayerResult:
    """Times the contenders from hidden states, or from router logits without `router_projection`, to the output; with
    `training`, on to the gradients of hidden states and experts. zexpert's logits come from router_logits, the others'
    from PyTorch's product in float32.

    Calls rotate over `weights`; the case has their dtype and device. The floor is the larger of two times:
    of the products at the rate of a large matrix product, and of the weights used at the rate of the memory. A training
    step has three times the products, reads the weights twice and writes their gradients. `peers` make further
    contenders; they are called like PlainLayer.
    """
    with torch.inference_mode(not training):
        dtype, device = weights[0].w2.dtype, weights[0].w2.device
        generator = torch.Generator(device).manual_seed(num_tokens)
        count = len(weights) ** 2 if device.type == "cpu" else (8 if num_tokens <= 64 else 2)
        inputs = [
            torch.randn(num_tokens, shape.hidden_size, generator=generator, device=device).to(dtype)
            for _ in range(count)
        ]
        logits = [router_logits(rows, weights[index % len(weights)]) for index, rows in enumerate(inputs)]

        calls = Calls(weights, inputs, None if router_projection else logits, training)

        def contender(make: Callable[..., nn.Module], project: Projection | None = router_logits) -> Run:
            return calls.contender([make(shape, one, training=training) for one in weights], project)

        # The loop over experts waits for the host.
        graphs = device.type == "cuda" and not training and zexpert_layer(shape, weights[0]).experts_backend != "torch"
        in_turns = {SUBJECT: contender(zexpert_layer, zexpert_router_logits)}
        if device.type == "cpu":
            in_turns["plain PyTorch"] = contender(PlainLayer)
        elif dtype == torch.bfloat16:
            in_turns["torch grouped_mm"] = contender(GroupedMMLayer)
        in_turns |= {name: contender(make) for name, make in (peers or {}).items()}
        apart: dict[str, Run] = {}  # those that wait for the host cannot be captured into a CUDA graph
        if router_projection and transformers_has(shape.routing):
            try:
                (apart if graphs else in_turns)["transformers"] = contender(transformers_layer, None)
            except ImportError:
                say("transformers is not installed, so it is left out (pip install transformers)")

        outputs = {name: run(0) for name, run in (in_turns | apart).items()}
        checks = check_outputs(shape, outputs, inputs[0], logits[0], weights[0], training=training)
        with machine.OtherLoad() as load:
            timings = harness.measure_on(device, in_turns, num_inputs=count, repeats=repeats, graphs=graphs)
            if apart:
                timings |= harness.measure_on(device, apart, num_inputs=count, repeats=repeats, graphs=False)
        work = work_of_inputs(shape, weights, logits, router_projection)
        in_turn = min(sum(read for _, read in work), len(weights) * shape.weight_bytes(dtype))
        limits = dataclasses.replace(limits, bandwidth=rates.bandwidth_for(in_turn, device, limits.bandwidth))
        passes = 3 if training else 1
        work = [(passes * operations, passes * num_bytes) for operations, num_bytes in work]
        threads = "" if device.type == "cuda" else ", " + harness.counted(torch.get_num_threads(), "thread")
        start = "" if router_projection else " from logits"
        what = f"{'training step' if training else 'layer'}{start}, {harness.counted(num_tokens, 'token')}"
        return LayerResult(
            case=f"{shape.routing.name}: {what}, {harness.dtype_name(dtype)}{threads}",
            subject=SUBJECT,
            floor=statistics.fmean(limits.floor(*one) for one in work),
            timings=timings,
            checks=checks,
            other_load=0.0 if device.type == "cuda" else load.share,
            target=target,
            name=shape.routing.name,
            num_tokens=num_tokens,
            operations=statistics.fmean(operations for operations, _ in work),
            num_bytes=statistics.fmean(num_bytes for _, num_bytes in work),
        )


@dataclass(frozen=True)
class Calls:
    """How every contender is called."""

    weights: Sequence[Weights]
    inputs: Sequence[Tensor]
    logits: Sequence[Tensor] | None  # None: made in the call
    training: bool

    def contender(self, layers: Sequence[nn.Module], project: Projection | None) -> Run:
        """A function of an input's index that returns the output of `layers`, one around each of the weights; in
        training, the gradient of the input. `project` makes the logits; None: the layers have a router."""

        def forward(index: int, rows: Tensor) -> Tensor:
            which = index % len(layers)
            if project is None:
                return layers[which](rows)  # type: ignore[no-any-return]
            given = project(rows, self.weights[which]) if self.logits is None else self.logits[index]
            return layers[which](rows, given)  # type: ignore[no-any-return]

        def call(index: int) -> Tensor:
            if not self.training:
                return forward(index, self.inputs[index])
            layers[index % len(layers)].zero_grad(set_to_none=True)
            return gradient(lambda rows: forward(index, rows), self.inputs[index])

        return call


def gradient(run: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Tensor:
    """Gradient of hidden_states of <run(hidden_states), hidden_states>, the second factor held."""
    leaf = hidden_states.detach().requires_grad_()
    run(leaf).backward(hidden_states)
    assert leaf.grad is not None
    return leaf.grad


def check_outputs(
    shape: Shape,
    outputs: dict[str, Tensor],
    hidden_states: Tensor,
    logits: Tensor,
    weights: Weights,
    *,
    training: bool,
) -> dict[str, harness.ErrorCheck]:
    """Outputs, or gradients of hidden_states, of sampled tokens against the same layer in float64."""
    num_tokens = hidden_states.size(0)
    sampled = torch.linspace(0, num_tokens - 1, min(num_tokens, CHECKED_TOKENS)).long().unique().to(logits.device)
    bias = None if weights.bias is None else weights.bias.cpu()
    sampled = sampled[~torch_routing.near_ties(logits[sampled].cpu(), bias, shape.routing).to(logits.device)]
    layer = PlainLayer(shape, weights)

    def plainly(dtype: torch.dtype) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return layer(x, router_logits(x, weights))  # type: ignore[no-any-return]

        rows = hidden_states[sampled].to(dtype)
        return gradient(run, rows) if training else run(rows)

    expected, plain = plainly(torch.float64), plainly(hidden_states.dtype)
    return {name: harness.check_error(output[sampled], plain, expected) for name, output in outputs.items()}


def work_of_inputs(
    shape: Shape, weights: Sequence[Weights], logits: Sequence[Tensor], router_projection: bool
) -> list[tuple[int, int]]:
    """(operations, bytes of weights) of a forward of each input. The router's projection counts as one product."""
    work = []
    for index, one in enumerate(logits):
        topk_ids = torch_routing.route(one, weights[index % len(weights)].bias, shape.routing)[1]
        busy = topk_ids[topk_ids >= 0]
        weight_bytes = int(busy.unique().numel()) * shape.values_per_expert * weights[0].w2.element_size()
        operations = 2 * busy.numel() * shape.values_per_expert
        if router_projection:
            classifier = weights[0].classifier
            weight_bytes += classifier.numel() * classifier.element_size()
            operations += 2 * one.size(0) * classifier.numel()
        work.append((operations, weight_bytes))
    return work
