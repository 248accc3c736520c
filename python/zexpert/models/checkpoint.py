"""From the expert tensors of public checkpoints to those of FusedMoE, as steps of load_state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Block = TypeVar("Block", bound="CheckpointBlock")

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
        self.register_load_state_dict_pre_hook(rename_before_load)  # type: ignore[no-untyped-call]

    def rename_checkpoint(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        """Gives the entries of a checkpoint under `prefix` this block's names, in place, and leaves those that have
        them. What does not fit is told in `error_msgs`, which load_state_dict raises."""
        raise NotImplementedError

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


def rename_before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Pre-hook of load_state_dict; the last of its arguments gathers errors."""
    assert isinstance(module, CheckpointBlock)
    module.rename_checkpoint(state_dict, prefix, rest[-1])


def rename(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Gives the entries of `state_dict` that start with prefix + an old name the new name, in place. A name that ends
    in "." stands for everything under it."""
    for old, new in names.items():
        for key in [key for key in state_dict if matches(key, prefix + old)]:
            state_dict[prefix + new + key.removeprefix(prefix + old)] = state_dict.pop(key)


def matches(key: str, name: str) -> bool:
    return key.startswith(name) if name.endswith(".") else key == name


def rename_experts(
    state_dict: dict[str, Any], prefix: str, num_real_experts: int, num_experts: int, error_msgs: list[str]
) -> None:
    """Turns the experts of a checkpoint under `prefix` into w13_weight and w2_weight there, in place. Understood are

        gate_up_proj [E, 2F, H] and down_proj [E, H, F], E being num_real_experts or num_experts: transformers' tensors.
            Rows past the real experts belong to zero experts and mean nothing; they are left out without a copy.
        {i}.gate_proj.weight [F, H], {i}.up_proj.weight [F, H] and {i}.down_proj.weight [H, F]: a module list.
        {i}.up_proj.weight [2F, H], gate rows first, and {i}.down_proj.weight: MoE++'s module list.

    Names that are FusedMoE's already are left alone. What does not fit is told in `error_msgs`, which
    load_state_dict raises.
    """
    for old, new in (("gate_up_proj", "w13_weight"), ("down_proj", "w2_weight")):
        if prefix + old not in state_dict:
            continue
        stacked = state_dict.pop(prefix + old)
        if stacked.dim() != 3 or stacked.size(0) not in (num_real_experts, num_experts):
            error_msgs.append(
                f"{prefix}{old} must have shape [{num_real_experts} or {num_experts}, ...], got {list(stacked.shape)}"
            )
        else:
            state_dict[prefix + new] = stacked[:num_real_experts]

    if not any(key.startswith(prefix + "0.") for key in state_dict):
        return
    w13, w2 = [], []
    for expert in range(num_real_experts):
        name = f"{prefix}{expert}."
        gate = state_dict.pop(name + "gate_proj.weight", None)
        up = state_dict.pop(name + "up_proj.weight", None)
        down = state_dict.pop(name + "down_proj.weight", None)
        if up is None or down is None:
            error_msgs.append(f"{name}up_proj.weight and {name}down_proj.weight must be there, got one or none")
            return
        w13.append(up if gate is None else torch.cat((gate, up)))
        w2.append(down)
        if w13[0].shape != w13[-1].shape or w2[0].shape != w2[-1].shape:
            error_msgs.append(f"{name}* must have the shapes of {prefix}0.*, got {list(up.shape)}, {list(down.shape)}")
            return
    state_dict[prefix + "w13_weight"] = torch.stack(w13)
    state_dict[prefix + "w2_weight"] = torch.stack(w2)
