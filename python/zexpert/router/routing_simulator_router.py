# SPDX-License-Identifier: Apache-2.0
"""Made-up routing, for measuring a layer under a known load."""

import torch
from torch import Tensor

from zexpert._C import ScoringFunc
from zexpert.ops.types import RoutingResult
from zexpert.router.base_router import BaseRouter
from zexpert.router.routing_method_type import RoutingMethodType
from zexpert.router.zero_expert_spec import ZeroExperts, zero_expert_spec

ROUTING_SIMULATIONS = ("uniform_random", "round_robin", "normal")


class RoutingSimulatorRouter(BaseRouter):
    """Ignores the logits' values and distributes tokens over all N experts, zero experts included, by a strategy:

        uniform_random  K different experts, each as likely as any other
        round_robin     slot s of the batch goes to expert s modulo N: the most even load there is
        normal          K different experts, likely in proportion to a bell curve over the expert index with its
                        middle at N / 2 and a standard deviation of N / 8: a skewed load

    Every chosen expert weighs routed_scaling_factor / K. The choice is a function of seed, token index and expert
    index alone: repeatable, the same on every device, and without a generator's state, so that it scripts and compiles.

    Args:
        top_k: experts per token.
        num_real_experts: experts with a feed-forward network.
        routing_simulation: one of the three strategies.
        zero_expert_type, zero_expert_num: as for ZeroExpertRouter; None for no zero experts.
        e_score_correction_bias: its length can give the number of zero experts; otherwise unused.
        routed_scaling_factor: see above.
        scoring_func, renormalize: kept in the spec; a simulation uses neither.
        indices_dtype: torch.int32 or torch.int64.
        seed: a non-negative integer below 2**31; another seed gives another random choice.

    Raises:
        ValueError: if the strategy is unknown, or an argument is out of range.
    """

    routing_method_type = RoutingMethodType.SIMULATED

    def __init__(
        self,
        top_k: int,
        num_real_experts: int,
        routing_simulation: str,
        *,
        zero_expert_type: ZeroExperts | None = None,
        zero_expert_num: int | None = None,
        e_score_correction_bias: Tensor | None = None,
        scoring_func: str | ScoringFunc = "softmax",
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        indices_dtype: torch.dtype = torch.int32,
        seed: int = 0,
    ) -> None:
        if routing_simulation not in ROUTING_SIMULATIONS:
            raise ValueError(
                f'routing_simulation must be "uniform_random", "round_robin" or "normal", got {routing_simulation!r}'
            )
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed must be in [0, 2**31), got {seed}")
        spec = zero_expert_spec(
            top_k=top_k,
            num_real_experts=num_real_experts,
            zero_expert_type=zero_expert_type,
            zero_expert_num=zero_expert_num,
            e_score_correction_bias=e_score_correction_bias,
            scoring_func=scoring_func,
            renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor,
        )
        super().__init__(spec, e_score_correction_bias=e_score_correction_bias, indices_dtype=indices_dtype)
        self.routing_simulation = routing_simulation
        self.seed = seed

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        chosen = self._choose(router_logits)
        num_identity = self.num_identity_experts
        if num_identity is None:
            num_identity = router_logits.size(1) - self.num_real_experts - self.num_constant_experts
        first_constant = self.num_real_experts + num_identity

        dtype = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
        weight = self.routed_scaling_factor / self.top_k
        is_real = chosen < self.num_real_experts
        is_identity = (chosen < first_constant) & ~is_real
        constants = torch.arange(self.num_constant_experts, device=chosen.device) + first_constant
        is_constant = chosen.unsqueeze(2) == constants
        return RoutingResult(
            is_real.to(dtype) * weight,
            torch.where(is_real, chosen, torch.full_like(chosen, -1)),
            is_identity.sum(dim=1).to(dtype) * weight,
            is_constant.sum(dim=1).to(dtype) * weight,
        )

    def _choose(self, router_logits: Tensor) -> Tensor:
        """[T, K] int64 experts in [0, N)."""
        num_tokens, width = router_logits.size(0), router_logits.size(1)
        fewest = max(self.top_k, self.num_real_experts + self.num_constant_experts)
        if width < fewest:
            raise ValueError(f"router_logits must have at least {fewest} columns, got {width}")
        device = router_logits.device
        token = torch.arange(num_tokens, device=device).unsqueeze(1)
        if self.routing_simulation == "round_robin":
            return (token * self.top_k + torch.arange(self.top_k, device=device)) % width

        expert = torch.arange(width, device=device)
        uniform = (self._hash(token * width + expert).to(torch.float64) + 0.5) / 2.0**32
        # Adding Gumbel noise to log-likelihoods makes the K largest a draw of K without replacement.
        keys = -torch.log(-torch.log(uniform))
        if self.routing_simulation == "normal":
            deviation = (expert.to(torch.float64) + 0.5 - width / 2) / (width / 8)
            keys = keys - 0.5 * deviation * deviation
        return torch.topk(keys, self.top_k, dim=1)[1]

    def _hash(self, index: Tensor) -> Tensor:
        """Well mixed 32-bit values, in int64, of int64 indices and the seed. Factors below 2**31 never overflow."""
        mixed = (index ^ (index >> 32) ^ (self.seed * 0x2C1B3C6D)) & 0xFFFFFFFF
        for _ in range(2):
            mixed = ((mixed ^ (mixed >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
            mixed = ((mixed ^ (mixed >> 15)) * 0x735A2D97) & 0xFFFFFFFF
            mixed = mixed ^ (mixed >> 15)
        return mixed
