# SPDX-License-Identifier: Apache-2.0
"""What Python and C++ share that is not a tensor."""

import enum
from typing import TypedDict, overload

class ScoringFunc(enum.Enum):
    """How a logit becomes a score: softmax over all experts, sigmoid, or sqrt(softplus)."""

    SOFTMAX = 0
    SIGMOID = 1
    SQRT_SOFTPLUS = 2

class ZeroExpertType(enum.Enum):
    """What a zero expert does with a token: returns it, adds a learned constant, or nothing."""

    IDENTITY = 0
    CONSTANT = 1
    DROP = 2

@overload
def name(value: ScoringFunc) -> str: ...
@overload
def name(value: ZeroExpertType) -> str:
    """The text for ``value`` in operator arguments and messages, such as ``"softmax"``."""

def parse_scoring_func(value: str) -> ScoringFunc:
    """The scoring function called ``value``: "softmax", "sigmoid" or "sqrtsoftplus"; ValueError for any other text."""

def parse_zero_expert_type(value: str) -> ZeroExpertType:
    """The zero-expert type called ``value``: "identity" or "copy", "constant", "drop" or "zero"; else ValueError."""

class RoutingSpec:
    """How tokens choose among experts ordered ``[real | identity | constant | drop]``.

    Immutable, hashable, picklable. Checked when made: ValueError names the field, what it must be and what it was.

    Args:
        top_k: K, experts chosen per token, 1 to 64.
        num_real_experts: R, experts with a feed-forward network.
        num_logits: N, the width of the logits; None leaves it to the logits.
        num_identity_experts: I, experts that return the token; None means all that are neither real nor constant.
        num_constant_experts: C, experts that add a learned constant. What is left, N - R - I - C, are drop experts.
        scoring_func: the enum, or its name.
        renormalize: divide the chosen weights by their sum.
        drop_before_renormalize: set the drop experts' weights to 0 before that sum (MoE++, arXiv 2410.07348). It needs
            renormalize, and drop experts.
        routed_scaling_factor: multiplies every weight, after the renormalisation.
        num_expert_group: groups that the real experts split into; 1 for none.
        topk_group: groups per token whose experts may be chosen.
        num_experts: the older name of num_logits, for one release.
    """

    def __init__(
        self,
        *,
        top_k: int,
        num_real_experts: int,
        num_logits: int | None = None,
        num_identity_experts: int | None = None,
        num_constant_experts: int = 0,
        scoring_func: ScoringFunc | str = "softmax",
        renormalize: bool = False,
        drop_before_renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        num_expert_group: int = 1,
        topk_group: int = 1,
        num_experts: int | None = None,
    ) -> None: ...
    @property
    def top_k(self) -> int: ...
    @property
    def num_real_experts(self) -> int: ...
    @property
    def num_logits(self) -> int | None: ...
    @property
    def num_experts(self) -> int | None:
        """The older name of num_logits."""

    @property
    def num_identity_experts(self) -> int | None: ...
    @property
    def num_constant_experts(self) -> int: ...
    @property
    def num_drop_experts(self) -> int | None:
        """D; None while num_logits or num_identity_experts is left to the logits."""

    @property
    def scoring_func(self) -> ScoringFunc: ...
    @property
    def renormalize(self) -> bool: ...
    @property
    def drop_before_renormalize(self) -> bool: ...
    @property
    def routed_scaling_factor(self) -> float: ...
    @property
    def num_expert_group(self) -> int: ...
    @property
    def topk_group(self) -> int: ...
    def for_width(self, width: int) -> RoutingSpec:
        """This spec for logits ``width`` wide, with every count known; ValueError if the width does not fit."""

    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

class _BuildInfo(TypedDict):
    version: str
    git_revision: str
    compiler: str
    torch_abi_target: str
    torch_build_version: str
    cuda_archs: list[str]
    cpu_capability: str

def build_info() -> _BuildInfo:
    """What the module was built from: see ``zexpert.build_info``."""

class KernelPlan:
    """The kernel that an operator call runs, and why."""

    @property
    def op(self) -> str: ...
    @property
    def backend(self) -> str:
        """ "cpu" or "cuda" for a kernel of zexpert's own, "torch" for PyTorch's matrix product."""

    @property
    def kernel(self) -> str:
        """Short name of the kernel."""

    @property
    def reason(self) -> str:
        """One sentence."""

    @property
    def implementation(self) -> str:
        """Of grouped_mlp and fused_moe, the name that forces it; else empty."""

def kernel_plan(
    op: str,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    weight_dtype: str | None = None,
    num_tokens: int | None = None,
    num_rows: int | None = None,
    num_experts: int | None = None,
    num_logits: int | None = None,
    top_k: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    compute_capability: int | None = None,
    has_hopper_code: bool = True,
    keep_gate_up: bool = True,
    implementation: str = "auto",
) -> KernelPlan:
    """The kernel that a call of ``op`` runs: see ``zexpert.kernel_plan``."""
