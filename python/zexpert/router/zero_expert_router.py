# SPDX-License-Identifier: Apache-2.0
"""Top-k over real and zero experts."""

from typing import Any

import torch
from torch import Tensor

from zexpert._C import ScoringFunc
from zexpert.ops.types import RoutingResult
from zexpert.router.biased_topk_router import BiasedTopKRouter
from zexpert.router.routing_method_type import RoutingMethodType
from zexpert.router.zero_expert_spec import ZeroExperts, zero_expert_spec


class ZeroExpertRouter(BiasedTopKRouter):
    """Chooses among real experts and zero experts, which have no feed-forward network.

    A slot that chose a zero expert has id -1 and weight 0, so no expert computes for it. Its weight is in zero_weight
    (identity: times the token itself), in constant_weight (constant), or nowhere (drop).
    LongCat-Flash (arXiv 2509.01322) uses identity experts, MoE++ (arXiv 2410.07348) all three kinds.

    Args:
        top_k: experts per token.
        num_real_experts: experts with a feed-forward network, the first columns of the logits.
        zero_expert_type: "identity" (or "copy"), "constant", "drop" (or "zero"), or the ZeroExpertType; or counts by
            these, such as {"identity": 1, "constant": 2, "drop": 1}.
        zero_expert_num: number of zero experts. None: what the mapping counts, else what the bias' length leaves,
            else what the logits' width leaves.
        e_score_correction_bias: [N], for selection only, by reference; None for none.
        scoring_func, renormalize, drop_before_renormalize, routed_scaling_factor, num_expert_group, topk_group: as in
            zexpert.ops.biased_topk. The groups are of real experts; zero experts are always eligible.
        indices_dtype: torch.int32 or torch.int64.

    Raises:
        ValueError: if an argument is out of range or contradicts another.
    """

    routing_method_type = RoutingMethodType.ZERO_EXPERT

    __jit_ignored_attributes__ = [  # noqa: RUF012
        *BiasedTopKRouter.__jit_ignored_attributes__,
        "_last_routing",
        "zero_expert_output",
    ]
    __jit_unused_properties__ = ["zero_expert_output"]  # noqa: RUF012

    def __init__(
        self,
        top_k: int,
        num_real_experts: int,
        zero_expert_type: ZeroExperts,
        zero_expert_num: int | None = None,
        *,
        e_score_correction_bias: Tensor | None = None,
        scoring_func: str | ScoringFunc = "softmax",
        renormalize: bool = False,
        drop_before_renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        num_expert_group: int = 1,
        topk_group: int = 1,
        indices_dtype: torch.dtype = torch.int32,
    ) -> None:
        if zero_expert_type is None:
            raise ValueError("zero_expert_type must be a name or a mapping from names to counts, got None")
        spec = zero_expert_spec(
            top_k=top_k,
            num_real_experts=num_real_experts,
            zero_expert_type=zero_expert_type,
            zero_expert_num=zero_expert_num,
            e_score_correction_bias=e_score_correction_bias,
            scoring_func=scoring_func,
            renormalize=renormalize,
            drop_before_renormalize=drop_before_renormalize,
            routed_scaling_factor=routed_scaling_factor,
            num_expert_group=num_expert_group,
            topk_group=topk_group,
        )
        super().__init__(spec, e_score_correction_bias=e_score_correction_bias, indices_dtype=indices_dtype)
        self._last_routing: tuple[Tensor, Tensor] | None = None

    def _observe(self, hidden_states: Tensor, routing: RoutingResult) -> None:
        if not torch.jit.is_scripting():
            if not torch.compiler.is_compiling():
                # Not through nn.Module.__setattr__, which looks for parameters: every call does this.
                self.__dict__["_last_routing"] = (hidden_states, routing.zero_weight)
            if self._capture_fn is not None:
                self._capture_fn(routing)

    def forget_routing(self) -> None:
        """See FusedMoERouter.forget_routing."""
        if not torch.compiler.is_compiling():
            self.__dict__["_last_routing"] = None

    @property
    def zero_expert_output(self) -> Tensor | None:
        """[T, H] in the dtype of hidden_states: zero_weight * hidden_states of the last routing, the identity experts'
        part of the layer's output. Computed here, once: reading it again gives None until the next routing.

        For engines that add the part themselves, with vLLM's name. Until it is read, the router keeps the tensors of
        the last eager call, and reads hidden_states as it is then. After a zexpert runner there is nothing to read: the
        runner adds the part in its epilogue. Scripts and compiled graphs keep no state.
        """
        last_routing = self._last_routing
        self._last_routing = None
        if last_routing is None:
            return None
        hidden_states, zero_weight = last_routing
        weight_dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        output: Tensor = torch.ops.zexpert.zero_expert_accumulate(hidden_states, zero_weight.to(weight_dtype))
        return output

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a saved router starts without the last routing's tensors.
        return {**super().__getstate__(), "_last_routing": None}
