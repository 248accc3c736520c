# SPDX-License-Identifier: Apache-2.0
"""From the expert tensors of public checkpoints to those of FusedMoE, as steps of load_state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zexpert.layer import FusedMoE, check_shapes_of_state_dict
from zexpert.runner.placement import EXPERT_WEIGHTS

Block = TypeVar("Block", bound="CheckpointBlock")

#: The expert tensors of transformers' checkpoints, and a block's names for them.
STACKED_EXPERTS = {"experts.gate_up_proj": "experts.w13_weight", "experts.down_proj": "experts.w2_weight"}

#: Sentinel of config_value: the entry must be there.
REQUIRED: Any = object()


def config_value(config: object, name: str, default: Any = REQUIRED) -> Any:
    """The entry `name` of a checkpoint's configuration: a mapping (config.json) or an object (transformers' config).

    Raises:
        ValueError: if it is missing, or None, and there is no default.
    """
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"config must have {name}, got none")
        return default
    return value


def require_silu(config: object) -> None:
    """Raises ValueError unless the experts' activation is the one FusedMoE has."""
    hidden_act = config_value(config, "hidden_act", "silu")
    if hidden_act != "silu":
        raise ValueError(f'hidden_act must be "silu", got {hidden_act!r}')


class CheckpointBlock(nn.Module):
    """A block of a published model whose load_state_dict also takes the names of that model's checkpoints.

    Since renaming is a step of load_state_dict, a whole model with such blocks loads a whole checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.load_prefix = ""  # what the block's names start with in the state dict that is being loaded
        self.register_load_state_dict_pre_hook(rename_before_load)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(tell_checkpoint_names)  # type: ignore[no-untyped-call]

    def checkpoint_names(self) -> dict[str, str]:
        """This block's name for each name of a checkpoint that differs; one that ends in "." is for all under it."""
        return {}

    def rename_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Gives the entries of a checkpoint under `prefix` this block's names, in place, and leaves those that have
        them. Raises RuntimeError for what does not fit."""
        rename_experts(state_dict, prefix, self.get_submodule("experts"))
        rename(state_dict, prefix, self.checkpoint_names())

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """The weights of all experts under a checkpoint's names, in a layout that load_state_dict takes.

        With an expert_parallel_group or a tensor_parallel_group all of its ranks call this, and each gets everything.
        """
        weights: dict[str, Tensor] = dict(self.state_dict())
        experts = self.get_submodule("experts")
        assert isinstance(experts, FusedMoE)
        for name in EXPERT_WEIGHTS:
            weights[f"experts.{name}"] = experts.placement.whole(name, experts.get_parameter(name).detach())
        rename(weights, "", {ours: theirs for theirs, ours in self.checkpoint_names().items()})
        return weights

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
            config: the constructor's.
            state_dict: of a block, a layer or a whole model; what is not under `prefix` is not looked at.
            prefix: what the block's names start with, such as "model.layers.0.mlp.".
            assign: use the tensors of `state_dict` themselves, on their device and in their dtype, instead of copies:
                a training step changes them then.
            options: the constructor's, such as params_dtype.

        Raises:
            ValueError: if nothing is under `prefix`.
            RuntimeError: if an entry is missing, unknown or of another shape.
        """
        entries = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        if not entries:
            raise ValueError(f"state_dict must have entries whose names start with {prefix!r}, got none")
        if assign:
            options["device"] = "meta"
        construct: Any = cls
        block: Block = construct(config, **options)
        block.load_state_dict(entries, assign=assign)
        return block


def require_config(config: object, kind: type) -> None:
    """Raises ValueError unless `config` is a `kind`, which another library's configuration is not."""
    if not isinstance(config, kind):
        raise ValueError(
            f"config must be a zexpert.models.{kind.__name__}, which its from_hf makes of a model's configuration, "
            f"got {type(config).__module__}.{type(config).__qualname__}"
        )


def rename_before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Pre-hook of load_state_dict: renames, then checks the shapes of what was renamed."""
    assert isinstance(module, CheckpointBlock)
    module.load_prefix = prefix
    module.rename_checkpoint(state_dict, prefix)
    check_shapes_of_state_dict(module, state_dict, prefix, shown=lambda key: checkpoint_name(module, key))


def tell_checkpoint_names(module: nn.Module, incompatible_keys: Any) -> None:
    """Post-hook of load_state_dict: missing entries are told by the checkpoint's names."""
    assert isinstance(module, CheckpointBlock)
    missing = incompatible_keys.missing_keys
    missing[:] = [checkpoint_name(module, key) for key in missing]


def checkpoint_name(block: CheckpointBlock, key: str) -> str:
    """The checkpoint's name for the entry that load_state_dict knows as `key`."""
    prefix = block.load_prefix
    for theirs, ours in block.checkpoint_names().items():
        if matches(key, prefix + ours):
            return prefix + theirs + key.removeprefix(prefix + ours)
    return key


def rename(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Gives the entries of `state_dict` that start with prefix + an old name the new name, in place. A name that ends
    in "." stands for everything under it."""
    for old, new in names.items():
        for key in [key for key in state_dict if matches(key, prefix + old)]:
            state_dict[prefix + new + key.removeprefix(prefix + old)] = state_dict.pop(key)


def matches(key: str, name: str) -> bool:
    return key.startswith(name) if name.endswith(".") else key == name


def rename_experts(state_dict: dict[str, Any], prefix: str, experts: nn.Module) -> None:
    """Turns the experts of a checkpoint under `prefix` into the w13_weight [R, 2F, H] and the w2_weight [R, H, F] of
    `experts`, a FusedMoE of N experts, in place. Understood are

        experts.gate_up_proj [E, 2F, H] and experts.down_proj [E, H, F], E being R or N: transformers' tensors. Rows
            past the real experts belong to zero experts and mean nothing; they are left out without a copy.
        experts.{i}.gate_proj.weight [F, H], .up_proj.weight [F, H] and .down_proj.weight [H, F]: a module list.
        experts.{i}.up_proj.weight [2F, H], gate rows first, and .down_proj.weight: MoE++'s module list.

    Names that are FusedMoE's already are left alone.

    Raises:
        RuntimeError: if an entry has another shape, or one expert of a module list lacks one.
    """
    assert isinstance(experts, FusedMoE)
    # A rank of several may hold only a part of these: FusedMoE takes its own out of the whole.
    num_real_experts = experts.num_experts
    hidden_size, intermediate_size = experts.hidden_size, experts.intermediate_size
    whole_sizes = {
        "experts.w13_weight": [2 * intermediate_size, hidden_size],
        "experts.w2_weight": [hidden_size, intermediate_size],
    }
    first_sizes = sorted({num_real_experts, experts.router.num_experts or num_real_experts})
    for theirs, ours in STACKED_EXPERTS.items():
        if prefix + theirs not in state_dict:
            continue
        stacked = state_dict.pop(prefix + theirs)
        sizes = whole_sizes[ours]
        if list(stacked.shape[1:]) != sizes or stacked.size(0) not in first_sizes:
            shape = ", ".join((" or ".join(map(str, first_sizes)), *map(str, sizes)))
            raise RuntimeError(f"{prefix}{theirs} must have shape [{shape}], got {list(stacked.shape)}")
        state_dict[prefix + ours] = stacked[:num_real_experts]

    if not any(key.startswith(f"{prefix}experts.0.") for key in state_dict):
        return
    shapes = {"up_proj": [2 * intermediate_size, hidden_size], "down_proj": [hidden_size, intermediate_size]}
    if f"{prefix}experts.0.gate_proj.weight" in state_dict:
        one_projection = [intermediate_size, hidden_size]
        shapes = {"gate_proj": one_projection, "up_proj": one_projection, "down_proj": shapes["down_proj"]}
    w13, w2 = [], []
    for expert in range(num_real_experts):
        weights = []
        for projection, expected in shapes.items():
            name = f"{prefix}experts.{expert}.{projection}.weight"
            if name not in state_dict:
                raise RuntimeError(f"{name} must be in the checkpoint, got none")
            weight = state_dict.pop(name)
            if list(weight.shape) != expected:
                raise RuntimeError(f"{name} must have shape {expected}, got {list(weight.shape)}")
            weights.append(weight)
        w13.append(torch.cat(weights[:-1]))
        w2.append(weights[-1])
    state_dict[prefix + "experts.w13_weight"] = torch.stack(w13)
    state_dict[prefix + "experts.w2_weight"] = torch.stack(w2)
