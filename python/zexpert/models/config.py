# SPDX-License-Identifier: Apache-2.0
"""Configurations of published models, and the options that all blocks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

#: Sentinel of config_value: the entry is required.
REQUIRED: Any = object()


class LayerOptions(TypedDict, total=False):
    """The keyword arguments that every block passes on to its FusedMoE, which documents them."""

    params_dtype: torch.dtype | None
    quantization: str | None
    chunk_size: int | None
    recompute: bool
    experts_backend: str
    expert_parallel_group: dist.ProcessGroup | DeviceMesh | None
    tensor_parallel_group: dist.ProcessGroup | DeviceMesh | None
    device: torch.device | str | None


def config_value(config: object, name: str, default: Any = REQUIRED, *, other_name: str | None = None) -> Any:
    """The entry `name` of a model's configuration: a mapping (config.json) or an object (transformers' config).

    Args:
        config: the configuration.
        name: of the entry.
        default: the value if there is none.
        other_name: the name in files of other versions of transformers.

    Raises:
        ValueError: if it is missing or None and there is no default.
    """
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if value is None and other_name is not None:
        return config_value(config, other_name, default)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"config must have {name}, got none")
        return default
    return value


def require_silu(config: object) -> None:
    """Raises ValueError unless the experts' activation is silu, which is the only one that FusedMoE has."""
    hidden_act = config_value(config, "hidden_act", "silu")
    if hidden_act != "silu":
        raise ValueError(f'hidden_act must be "silu", got {hidden_act!r}')


def require_config(config: object, kind: type) -> None:
    """Raises ValueError unless `config` is a `kind`. Another library's configuration is not."""
    if not isinstance(config, kind):
        raise ValueError(
            f"config must be a zexpert.models.{kind.__name__}, which its from_hf makes of a model's configuration, "
            f"got {type(config).__module__}.{type(config).__qualname__}"
        )
