# SPDX-License-Identifier: Apache-2.0
"""Blocks that load the tensors of public checkpoints: renamed, and expert by expert, as a step of load_state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zexpert.layer import FusedMoE, check_shapes_of_state_dict
from zexpert.layer_quantization import check_has_scales, is_quantisable
from zexpert.models.expert_tensors import ExpertLoader, ExpertTensor, module_list
from zexpert.ops.quantize_blockwise import num_scale_blocks
from zexpert.runner.placement import EXPERT_WEIGHTS

Block = TypeVar("Block", bound="CheckpointBlock")


class CheckpointBlock(nn.Module):
    """A block of a published model. Its load_state_dict accepts the names of that model's checkpoints and its own.

    A checkpoint has all experts in one tensor ("experts.gate_up_proj") or a module list ("experts.3.up_proj.weight").
    Each tensor of a module list is copied to its place in the layer's weights. So a checkpoint can be loaded shard by
    shard with strict=False, wherever the shards are cut.

    The names are changed inside load_state_dict, so a whole model that contains such blocks loads a whole checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.load_prefix = ""  # the prefix of the block's names in the state dict that is being loaded
        self.expert_loader = ExpertLoader()
        self.register_load_state_dict_pre_hook(load_checkpoint_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(report_checkpoint_names)  # type: ignore[no-untyped-call]

    def checkpoint_names(self) -> dict[str, str]:
        """Maps the checkpoint's names to this block's where they differ. A name that ends in "." stands for all names
        that start with it."""
        name, experts = experts_of(self)
        # transformers' tensors of all experts
        names = {"experts.gate_up_proj": f"{name}.w13_weight", "experts.down_proj": f"{name}.w2_weight"}
        if experts.quantization is not None:
            names |= {f"{theirs}_scale_inv": f"{ours}_scale_inv" for theirs, ours in names.items()}
        return names

    def expert_tensors(self) -> dict[str, ExpertTensor]:
        """The entries of a checkpoint that has a module list of experts, by name."""
        return module_list(experts_of(self)[1], "experts.{}.", gate_proj=True)

    def rename_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Gives the entries of a checkpoint under `prefix` this block's names, in place. Entries with the block's own
        names stay, and so do those of expert_tensors. Raises RuntimeError for a tensor that does not fit."""
        trim_stacked_experts(state_dict, prefix, experts_of(self)[1])
        rename(state_dict, prefix, self.checkpoint_names())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """nn.Module.load_state_dict, for a checkpoint's names too. If strict, float8 experts without scales are refused
        before anything is loaded."""
        name, experts = experts_of(self)
        if strict and experts.quantization is not None:
            check_has_scales([*self.expert_tensors(), *(f"{name}.{weight}" for weight in EXPERT_WEIGHTS)], state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """The weights of all experts under a checkpoint's names, in a layout that load_state_dict accepts.

        With an expert_parallel_group or a tensor_parallel_group, all of its ranks must call this; each gets everything.
        """
        weights: dict[str, Tensor] = dict(self.state_dict())
        name, experts = experts_of(self)
        if experts.quantization is not None:
            for weight in experts.placement.whole_shapes:
                del weights[f"{name}.{weight}"]
            rename(weights, "", {ours: theirs for theirs, ours in self.checkpoint_names().items()})
            return weights | self.quantised_experts()
        for weight in EXPERT_WEIGHTS:
            weights[f"{name}.{weight}"] = experts.placement.whole(weight, experts.get_parameter(weight).detach())
        rename(weights, "", {ours: theirs for theirs, ours in self.checkpoint_names().items()})
        return weights

    def quantised_experts(self) -> dict[str, Tensor]:
        """The tensors of all experts and their scales, as checkpoints with float8 experts have them."""
        _, experts = experts_of(self)
        whole = {
            name: experts.placement.whole(name, experts.get_parameter(name).detach())
            for name in experts.placement.whole_shapes
        }
        tensors = {}
        for name, place in self.expert_tensors().items():
            of_expert = whole[place.weight][place.expert]
            tensors[name] = (of_expert if place.half is None else of_expert.chunk(2)[place.half]).clone()
        return tensors

    @classmethod
    def from_state_dict(
        cls: type[Block],
        config: Any,
        state_dict: Mapping[str, Tensor],
        *,
        prefix: str = "",
        assign: bool = False,
        **options: Any,
    ) -> Block:
        """A block with the weights of a checkpoint.

        Args:
            config: as in the constructor.
            state_dict: of a block, a layer or a whole model. Names that do not start with `prefix` are ignored.
            prefix: the start of the block's names, such as "model.layers.0.mlp.".
            assign: use the tensors of `state_dict` themselves, on their device and in their dtype, instead of copies.
                A training step then changes them. The experts of a module list are copied all the same.
            options: as in the constructor, such as params_dtype. quantization is "fp8_block" unless it is given, if the
                checkpoint has float8 experts with scales.

        Raises:
            ValueError: if no name starts with `prefix`.
            RuntimeError: if an entry is missing, unknown or has another shape, or float8 weights have no scales.
        """
        entries = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        if not entries:
            raise ValueError(f"state_dict must have entries whose names start with {prefix!r}, got none")
        if assign:
            options["device"] = "meta"
        if any(
            tensor.dtype == torch.float8_e4m3fn and "experts." in name and f"{name}_scale_inv" in entries
            for name, tensor in entries.items()
        ):
            options.setdefault("quantization", "fp8_block")
        construct: Any = cls
        block: Block = construct(config, **options)
        listed = block.expert_tensors()
        # Weights without scales are quantised, and make their scales.
        needed = [name for name in listed if not is_made_from(name.removesuffix("_scale_inv"), name, entries)]
        missing = [name for name in needed if name not in entries]
        if missing and len(missing) < len(needed):
            raise RuntimeError(f"{missing[0]} must be in the checkpoint, got none")
        block.load_state_dict(entries, assign=assign)
        return block


class SelectionBiasBlock(CheckpointBlock):
    """A CheckpointBlock with a selection bias, float32 and 0 at first."""

    __jit_unused_properties__ = ["e_score_correction_bias"]  # noqa: RUF012
    __jit_ignored_attributes__ = ["config", "e_score_correction_bias"]  # noqa: RUF012

    @property
    def e_score_correction_bias(self) -> Tensor:
        """[N], the selection bias: the tensor that routing reads and a controller updates."""
        # A copy that PEFT trains (modules_to_save) answers for itself; PEFT's LoRA does not.
        bias = getattr(self.experts, "e_score_correction_bias", None)
        if bias is None:
            bias = experts_of(self)[1].e_score_correction_bias
        assert isinstance(bias, Tensor)
        return bias

    def reset_parameters(self) -> None:
        """Sets the selection bias to 0. The submodules' reset_parameters draw the weights."""
        with torch.no_grad():
            self.e_score_correction_bias.zero_()


def experts_of(block: nn.Module) -> tuple[str, FusedMoE]:
    """The block's FusedMoE and its name: "experts", or longer if PEFT has wrapped it."""
    return next((name, module) for name, module in block.named_modules() if isinstance(module, FusedMoE))


def checkpoint_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, with every block's entries under the names of its published checkpoint.

    transformers' save_pretrained(folder, state_dict=...) then writes files that other programs can read. With groups,
    all of their ranks must call this.
    """
    weights: dict[str, Tensor] = dict(model.state_dict())
    for name, block in model.named_modules():
        if isinstance(block, CheckpointBlock):
            prefix = f"{name}." if name else ""
            for key in block.state_dict():
                del weights[prefix + key]
            weights |= {prefix + key: tensor for key, tensor in block.checkpoint_state_dict().items()}
    return weights


def load_checkpoint_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: object
) -> None:
    """Pre-hook of load_state_dict: renames, checks everything, then copies the tensors of a module list of experts."""
    assert isinstance(module, CheckpointBlock)
    module.load_prefix = prefix
    module.rename_checkpoint(state_dict, prefix)
    loader = module.expert_loader
    loader.take(module.expert_tensors(), state_dict, prefix)
    check_shapes_of_state_dict(module, state_dict, prefix, shown=lambda key: checkpoint_name(module, key))
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    experts_name, experts = experts_of(module)
    for name, weight in loader.fill(experts, assign).items():
        key = f"{prefix}{experts_name}.{name}"
        if name in loader.complete or key in state_dict:
            state_dict[key] = weight


def report_checkpoint_names(module: nn.Module, incompatible_keys: Any) -> None:
    """Post-hook of load_state_dict: reports missing entries by the checkpoint's names."""
    assert isinstance(module, CheckpointBlock)
    missing = incompatible_keys.missing_keys
    missing[:] = [checkpoint_name(module, key) for key in missing]
    missing += [module.load_prefix + name for name in module.expert_loader.missing]


def checkpoint_name(block: CheckpointBlock, key: str) -> str:
    """The checkpoint's name for the entry that load_state_dict knows as `key`."""
    prefix = block.load_prefix
    for theirs, ours in block.checkpoint_names().items():
        if matches(key, prefix + ours):
            return prefix + theirs + key.removeprefix(prefix + ours)
    return key


def is_made_from(weight: str, name: str, entries: Mapping[str, Tensor]) -> bool:
    """True if `name` is the scales of an entry `weight` that needs none."""
    return name != weight and weight in entries and is_quantisable(entries[weight])


def rename(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Renames the entries of `state_dict` under `prefix`, in place. A name that ends in "." stands for all names that
    start with it."""
    for old, new in names.items():
        for key in [key for key in state_dict if matches(key, prefix + old)]:
            state_dict[prefix + new + key.removeprefix(prefix + old)] = state_dict.pop(key)


def matches(key: str, name: str) -> bool:
    return key.startswith(name) if name.endswith(".") else key == name


def trim_stacked_experts(state_dict: dict[str, Any], prefix: str, experts: FusedMoE) -> None:
    """Leaves the real experts of transformers' tensors under `prefix`, as views:

        experts.gate_up_proj [E, 2F, H] and experts.down_proj [E, H, F], where E is R or N. Rows past the R real experts
        belong to zero experts and have no meaning.

    Raises:
        RuntimeError: if a tensor has another shape.
    """
    # With groups a rank holds a part of these. FusedMoE selects it from the whole.
    num_real_experts = experts.num_experts
    hidden_size, intermediate_size = experts.hidden_size, experts.intermediate_size
    first_sizes = sorted({num_real_experts, experts.router.num_experts or num_real_experts})
    hidden_blocks, inner_blocks = num_scale_blocks(hidden_size), num_scale_blocks(intermediate_size)
    stacked_sizes = {
        "experts.gate_up_proj": [2 * intermediate_size, hidden_size],
        "experts.down_proj": [hidden_size, intermediate_size],
    }
    if experts.quantization is not None:
        stacked_sizes["experts.gate_up_proj_scale_inv"] = [2 * inner_blocks, hidden_blocks]
        stacked_sizes["experts.down_proj_scale_inv"] = [hidden_blocks, inner_blocks]
    for name, sizes in stacked_sizes.items():
        stacked = state_dict.get(prefix + name)
        if stacked is None:
            continue
        if list(stacked.shape[1:]) != sizes or stacked.size(0) not in first_sizes:
            shape = ", ".join((" or ".join(map(str, first_sizes)), *map(str, sizes)))
            raise RuntimeError(f"{prefix}{name} must have shape [{shape}], got {list(stacked.shape)}")
        state_dict[prefix + name] = first_rows(stacked, num_real_experts)


def first_rows(tensor: Tensor, count: int) -> Tensor:
    """tensor[:count] in the same memory, with a storage of its own if possible: torch.save writes the whole storage of
    a view, and safetensors' save_model refuses one."""
    rows = tensor[:count]
    if type(tensor.data) is not Tensor or tensor.is_meta or not rows.is_contiguous() or rows.numel() == tensor.numel():
        return rows
    begin = tensor.storage_offset() * tensor.element_size()
    storage: torch.UntypedStorage = tensor.untyped_storage()[begin : begin + rows.nbytes]
    return rows.new_empty(0).set_(storage, 0, rows.shape, rows.stride())
