# SPDX-License-Identifier: Apache-2.0
"""LongCat-Flash checkpoints in the layout that the hub has, written from a model of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def hub_tensors(model: Any) -> dict[str, Tensor]:
    """The model's weights in the hub's layout: a tensor per real expert and projection."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix, found, projection = name.partition("experts.")
        if not found:
            tensors[name] = tensor
            continue
        for expert in range(model.config.n_routed_experts):
            names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            for part, values in zip(names, tensor[expert].chunk(len(names)), strict=True):
                tensors[f"{prefix}experts.{expert}.{part}.weight"] = values.contiguous()
    return tensors


def write(folder: Path, config: Any, tensors: dict[str, Tensor], num_files: int = 3) -> Path:
    """A folder as the hub has it. Files are cut between any two tensors."""
    folder.mkdir()
    config.save_pretrained(folder)
    names = sorted(tensors)
    weight_map = {}
    for index in range(num_files):
        file = f"model-{index}.safetensors" if num_files > 1 else "model.safetensors"
        own = names[index * len(names) // num_files : (index + 1) * len(names) // num_files]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    if num_files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
