# SPDX-License-Identifier: Apache-2.0
"""Times the layer's epilogue, moe_finalize, against the same sum composed of torch operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zexpert import ops
from zexpert_tools.benchmark import harness, machine, rates
from zexpert_tools.benchmark.torch_routing import RoutingCase

SUBJECT = "zexpert"
CHECKED_TOKENS = 256


@dataclass(frozen=True)
class Inputs:
    rows: Tensor  # [T * K, H]
    slot_rows: Tensor  # [T, K]
    topk_weights: Tensor  # [T, K]
    hidden_states: Tensor  # [T, H]
    zero_weight: Tensor  # [T]

    def first(self, num_tokens: int) -> Inputs:
        tokens = slice(0, num_tokens)
        return Inputs(
            self.rows,
            self.slot_rows[tokens],
            self.topk_weights[tokens],
            self.hidden_states[tokens],
            self.zero_weight[tokens],
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        """Every token's own rows alone, in another dtype."""
        slots = self.slot_rows.flatten().long().clamp(min=0)
        own = torch.arange(slots.numel(), device=slots.device).reshape(self.slot_rows.shape)
        return Inputs(
            self.rows[slots].to(dtype),
            torch.where(self.slot_rows >= 0, own, -1).int(),
            self.topk_weights.to(dtype),
            self.hidden_states.to(dtype),
            self.zero_weight.to(dtype),
        )


def make_inputs(
    case: RoutingCase, hidden_size: int, num_tokens: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    """Experts drawn evenly, zero experts' weights summed."""
    generator = torch.Generator(device).manual_seed(seed)

    def rand(*sizes: int) -> Tensor:
        return torch.rand(sizes, device=device, generator=generator)

    experts = rand(num_tokens, case.num_experts).topk(case.top_k).indices
    is_real = experts < case.num_real_experts
    is_identity = ~is_real & (experts < case.num_real_experts + case.num_identity_experts)
    plan = ops.moe_plan(torch.where(is_real, experts, -1), case.num_real_experts)
    weights = rand(num_tokens, case.top_k)
    return Inputs(
        torch.randn(num_tokens * case.top_k, hidden_size, device=device, generator=generator).to(dtype),
        plan.slot_rows,
        weights * is_real,
        torch.randn(num_tokens, hidden_size, device=device, generator=generator).to(dtype),
        (weights * is_identity).sum(1),
    )


def epilogue(inputs: Inputs) -> Tensor:
    return ops.moe_finalize(
        inputs.rows, inputs.slot_rows, inputs.topk_weights, inputs.hidden_states, inputs.zero_weight
    )


def composed(inputs: Inputs) -> Tensor:
    """Rows back in slot order, those without work as zeros, then one weighted sum and the zero part."""
    taken = inputs.rows[inputs.slot_rows.clamp(min=0).long()]
    weights = inputs.topk_weights.masked_fill(inputs.slot_rows < 0, 0).to(taken.dtype)
    summed = torch.einsum("tk,tkh->th", weights, taken)
    return summed + inputs.zero_weight[:, None].to(taken.dtype) * inputs.hidden_states


def run_case(
    case: RoutingCase,
    hidden_size: int,
    num_tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    bandwidth: float,
    with_compile: bool = False,
) -> harness.CaseResult:
    """Times moe_finalize. The floor reads the rows that did work and the tokens, and writes the output."""
    row_bytes = hidden_size * dtype.itemsize
    contenders: dict[str, Callable[[Inputs], Tensor]] = {SUBJECT: epilogue}
    if with_compile:
        torch.compiler.reset()
        contenders["torch.compile"] = torch.compile(composed, dynamic=False)
    contenders["torch ops"] = composed
    count = harness.inputs_to_rotate(device, num_tokens * case.top_k * row_bytes, len(contenders))
    inputs = [make_inputs(case, hidden_size, num_tokens, dtype, device, seed) for seed in range(count)]
    num_rows = sum(int((one.slot_rows >= 0).sum()) for one in inputs) / count

    few = inputs[0].first(CHECKED_TOKENS)
    expected, plain = composed(few.to(torch.float64)), composed(few)
    checks = {
        name: harness.check_error(run(inputs[0])[:CHECKED_TOKENS], plain, expected) for name, run in contenders.items()
    }
    runs = {name: harness.on_inputs(run, inputs) for name, run in contenders.items()}
    with machine.OtherLoad() as load:
        timings = harness.measure_on(device, runs, num_inputs=count, repeats=repeats)
    num_bytes = (num_rows + 2 * num_tokens) * row_bytes
    bandwidth = rates.bandwidth_for(int(count * num_bytes), device, bandwidth)
    sizes = f"{harness.counted(num_tokens, 'token')}, hidden size {hidden_size}"
    return harness.CaseResult(
        case=f"{case.name}: {sizes}, {harness.dtype_name(dtype)}",
        subject=SUBJECT,
        floor=num_bytes / bandwidth,
        timings=timings,
        checks=checks,
        other_load=0.0 if device.type == "cuda" else load.share,
    )
