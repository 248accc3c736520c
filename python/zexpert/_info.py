# SPDX-License-Identifier: Apache-2.0
"""What this zexpert is made of, and which kernel a call runs."""

from __future__ import annotations

from typing import TypedDict

import torch

from zexpert import _C
from zexpert._C import KernelPlan
from zexpert._loader import CORE_LIBRARY, CUDA_LIBRARY, cuda_library_info, load_libraries


class BuildInfo(TypedDict):
    """What ``build_info`` returns."""

    version: str
    """zexpert's."""
    git_revision: str
    """Of the commit it was built from, with ``-dirty`` if files differed; "unknown" outside git."""
    compiler: str
    """Of the C++ code."""
    torch_abi_target: str
    """The earliest PyTorch it runs under."""
    torch_build_version: str
    """The PyTorch it was built with."""
    torch_version: str
    """The PyTorch it runs under."""
    cpu_capability: str
    """Instruction set of the CPU kernels on this machine: "AVX512", "AVX2" or "DEFAULT"."""
    cuda_library: str
    """ "loaded", "not built", or "not loaded: ..." with the reason."""
    cuda_archs: list[str]
    """GPU architectures that the CUDA library was compiled for, such as ``["9.0a"]``."""
    libraries: list[str]
    """Paths of the operator libraries that are loaded: what torch.ops.load_library, or dlopen in a C++ process, needs
    to run a saved module."""
    cuda_toolkit: str | None
    """Version of the CUDA toolkit that compiled it; None unless the library is loaded."""


def build_info() -> BuildInfo:
    """What this zexpert was built from and what it runs on."""
    libraries = load_libraries()
    module = _C.build_info()
    toolkit, archs = cuda_library_info() if libraries.cuda_loaded else (None, module["cuda_archs"])
    return {
        "version": module["version"],
        "git_revision": module["git_revision"],
        "compiler": module["compiler"],
        "torch_abi_target": module["torch_abi_target"],
        "torch_build_version": module["torch_build_version"],
        "torch_version": str(torch.__version__),
        "cpu_capability": module["cpu_capability"],
        "cuda_library": libraries.cuda_state,
        "cuda_archs": list(archs),
        "cuda_toolkit": toolkit,
        "libraries": [str(CORE_LIBRARY), *([str(CUDA_LIBRARY)] if libraries.cuda_loaded else [])],
    }


def kernel_plan(
    op: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    weight_dtype: str | torch.dtype | None = None,
    num_tokens: int | None = None,
    num_rows: int | None = None,
    num_experts: int | None = None,
    num_logits: int | None = None,
    top_k: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    compute_capability: int | None = None,
    keep_gate_up: bool = True,
    implementation: str = "auto",
    experts_backend: str = "auto",
) -> KernelPlan:
    """The kernel that a call of ``op`` would run on this machine's CPU, or on a GPU here or elsewhere.

    Give the sizes that the choice depends on. On the CPU ``grouped_mlp``, and ``fused_moe`` without ``keep_gate_up``,
    choose by the rows of each expert's segment: give ``num_experts``, and ``num_rows`` or ``num_tokens`` with
    ``top_k``; the plan is for rows spread evenly over the experts. A size that is not given fits every kernel.

    Args:
        op: the operator's name, such as "biased_topk".
        device: of its tensors.
        dtype: of its data; float32 unless given. For ``moe_plan``, of the ids; int32 unless given.
        weight_dtype: of the weights of ``grouped_mlp`` and ``fused_moe``: float8_e4m3fn if they are quantised, else
            ``dtype``.
        num_tokens: T.
        num_rows: rows of all experts together, T * K unless given.
        num_experts: R, experts that have a feed-forward network.
        num_logits: N, the width of the logits of ``biased_topk`` and ``biased_topk_and_plan``; num_experts, the older
            name, unless given.
        top_k: K.
        hidden_size: H.
        intermediate_size: F.
        compute_capability: the major number of the GPU's, 9 for a Hopper GPU; the current GPU's unless given.
        keep_gate_up: of ``fused_moe``: True for training.
        implementation: of ``grouped_mlp`` and ``fused_moe``: "auto", or the name that forces one.
        experts_backend: for one release: "hopper" stands for ``compute_capability=9``.

    Returns:
        ``op``, ``backend`` ("cpu" or "cuda" for zexpert's kernels, "torch" for PyTorch's matrix product), ``kernel``
        (its short name), ``reason`` (one sentence) and, for ``grouped_mlp`` and ``fused_moe``, ``implementation`` (the
        name that forces it).

    Raises:
        ValueError: unknown operator, device or dtype, a size out of range, one that is needed and missing, or an
            implementation that cannot serve.
    """
    if experts_backend not in ("auto", "hopper"):
        raise ValueError(f'experts_backend must be "auto" or "hopper", got "{experts_backend}"')
    device_type = device.type if isinstance(device, torch.device) else device.partition(":")[0]
    if experts_backend == "hopper":
        compute_capability = 9
    if compute_capability is None and device_type == "cuda" and torch.cuda.is_available():
        compute_capability = torch.cuda.get_device_capability()[0]
    has_hopper_code = not load_libraries().cuda_loaded or any(
        architecture.startswith("9.0a") for architecture in cuda_library_info()[1]
    )
    return _C.kernel_plan(
        op,
        device=device_type,
        dtype=name_of_dtype(dtype),
        weight_dtype=name_of_dtype(weight_dtype),
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_experts=num_experts,
        num_logits=num_logits,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        compute_capability=compute_capability,
        has_hopper_code=has_hopper_code,
        keep_gate_up=keep_gate_up,
        implementation=implementation,
    )


def name_of_dtype(dtype: str | torch.dtype | None) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
