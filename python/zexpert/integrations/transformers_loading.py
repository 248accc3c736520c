# SPDX-License-Identifier: Apache-2.0
"""LongCat-Flash in the hub's layout, loaded into a model of transformers whose mixtures of experts are zexpert's.

The hub's checkpoints have a tensor for each real expert and projection. transformers cannot load them: it stacks them
to gate_up_proj with a row per real expert, and its model has rows for the zero experts too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zexpert.models.config import LayerOptions
from zexpert.models.longcat_flash import LongcatFlashConfig, LongcatFlashMoE

if TYPE_CHECKING:
    from typing_extensions import Unpack


def from_pretrained(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **options: Unpack[LayerOptions],
) -> nn.Module:
    """A LongcatFlashForCausalLM of transformers, in eval mode, whose `mlp` modules are zexpert.models.LongcatFlashMoE.

    Weights are copied tensor by tensor from the mapped files to their places, on `device`: no second copy of a layer's
    experts exists. With an expert_parallel_group a rank copies the experts that it holds.

    Args:
        name_or_folder: a model on the hub, or a folder with config.json and safetensors files.
        dtype: of all weights but the routers', which are float32; None for the configuration's.
        attn_implementation: as in transformers.
        revision, cache_dir, token, local_files_only: as in huggingface_hub.
        options: device, chunk_size, recompute, experts_backend, expert_parallel_group and tensor_parallel_group, as in
            FusedMoE.

    Returns:
        The model. zexpert.models.checkpoint_state_dict(model) gives its weights transformers' names, for
        save_pretrained.

    Raises:
        ValueError: if it is not a LongCat-Flash, the checkpoint is quantised, or an option is not as in FusedMoE.
        RuntimeError: if a tensor is missing, unknown, quantised or has another shape.
        OSError: if there are no such files.
    """
    from transformers import AutoConfig, GenerationConfig, LongcatFlashForCausalLM

    hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    folder = checkpoint_folder(name_or_folder, hub)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "longcat_flash":
        raise ValueError(f"name_or_folder must be a LongCat-Flash (longcat_flash), got a {config.model_type}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("name_or_folder must not be quantised, got a checkpoint with a quantization_config")
    checkpoint = Checkpoint(folder)
    dtype = dtype or config.dtype or torch.get_default_dtype()
    device = torch.device(options.setdefault("device", "cpu") or "cpu")
    options["params_dtype"] = dtype

    with torch.device("meta"):
        model = LongcatFlashForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    base = model.model
    base.rotary_emb = type(base.rotary_emb)(config=config).to(device)  # its buffers are in no checkpoint
    blocks: dict[str, LongcatFlashMoE] = {}
    for index, layer in enumerate(base.layers):
        layer.mlp = LongcatFlashMoE(LongcatFlashConfig.from_hf(config), **options)
        blocks[f"model.layers.{index}.mlp."] = layer.mlp
    load(model, blocks, checkpoint, device, model._keys_to_ignore_on_load_unexpected or [])
    if config.tie_word_embeddings:
        model.tie_weights()
    with suppress(OSError):  # a checkpoint need not have one
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(name_or_folder)
    out: nn.Module = model.eval()
    return out


def checkpoint_folder(name_or_folder: str | Path, hub: Mapping[str, Any]) -> Path:
    """The folder of a checkpoint, downloaded if it is not one."""
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name_or_folder), allow_patterns=["*.json", "*.safetensors"], **hub))


class Checkpoint:
    """The tensors of a folder's safetensors files by name. They are mapped, not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise OSError(f"name_or_folder must have safetensors files, got none in {folder}")
        self.files = files

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each file."""
        from safetensors import safe_open

        for file in self.files:
            with safe_open(str(self.folder / file), framework="pt", device="cpu") as shard:
                yield {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118


def load(
    model: Any,
    blocks: Mapping[str, LongcatFlashMoE],
    checkpoint: Checkpoint,
    device: torch.device,
    ignored: list[str],
) -> None:
    """Fills the blocks, and the model's other parameters, which are on the meta device.

    Args:
        model: the model.
        blocks: its blocks, by the prefix of their names.
        checkpoint: the tensors.
        device: for the other parameters.
        ignored: patterns of names that the model does not need.

    Raises:
        RuntimeError: if a tensor is missing, unknown, quantised or has another shape.
    """
    seen: dict[str, set[str]] = {prefix: set() for prefix in blocks}
    for shard in checkpoint.shards():
        of_blocks: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in blocks}
        for name, tensor in shard.items():
            prefix = block_prefix(name, blocks)
            if prefix is not None:
                if not is_of_zero_expert(name, blocks[prefix].config):
                    of_blocks[prefix][name.removeprefix(prefix)] = tensor
            elif not any(re.search(pattern, name) for pattern in ignored):
                fill_parameter(model, name, tensor, device)
        for prefix, tensors in of_blocks.items():
            seen[prefix].update(tensors)
            if tensors:
                unexpected = blocks[prefix].load_state_dict(tensors, strict=False).unexpected_keys
                if unexpected:
                    raise RuntimeError(f"{prefix}{unexpected[0]} must be a tensor of LongCat-Flash, got another name")
    for prefix, block in blocks.items():
        missing = [name for name in block_tensors(block, seen[prefix]) if name not in seen[prefix]]
        if missing:
            raise RuntimeError(f"{prefix}{missing[0]} must be in the checkpoint, got none")
    tied = getattr(model, "_tied_weights_keys", None) or {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not (model.config.tie_word_embeddings and name in tied):
            raise RuntimeError(f"{name} must be in the checkpoint, got none")


def block_prefix(name: str, blocks: Mapping[str, LongcatFlashMoE]) -> str | None:
    """The prefix of the block that the tensor `name` is of, if any."""
    match = re.match(r"model\.layers\.\d+\.mlp\.", name)
    return match.group() if match is not None and match.group() in blocks else None


def is_of_zero_expert(name: str, config: LongcatFlashConfig) -> bool:
    """True for a zero expert's rows of gate_up_proj, which save_pretrained of transformers writes as an expert's."""
    match = re.search(r"\.experts\.(\d+)\.(gate|up)_proj\.weight$", name)
    return match is not None and config.n_routed_experts <= int(match.group(1)) < config.num_experts


def block_tensors(block: LongcatFlashMoE, seen: set[str]) -> list[str]:
    """The names of a block's tensors in the layout of which `seen` has some: the hub's, or transformers' own."""
    experts = list(block.expert_tensors())
    if seen.isdisjoint(experts) and "experts.gate_up_proj" in seen:
        experts = ["experts.gate_up_proj", "experts.down_proj"]
    return ["router.classifier.weight", "router.e_score_correction_bias", *experts]


def fill_parameter(model: nn.Module, name: str, tensor: Tensor, device: torch.device) -> None:
    """Gives a parameter of the model the values of a checkpoint's tensor, in the parameter's dtype."""
    owner, _, attribute = name.rpartition(".")
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        raise RuntimeError(f"{name} must be a tensor of LongCat-Flash, got another name") from None
    if tensor.shape != parameter.shape:
        raise RuntimeError(f"{name} must have shape {list(parameter.shape)}, got {list(tensor.shape)}")
    values = plain_values(name, tensor).to(device, parameter.dtype, copy=True)
    setattr(model.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=parameter.requires_grad))


def plain_values(name: str, tensor: Tensor) -> Tensor:
    """The values of a weight that is not an expert's."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise RuntimeError(f"{name} must not be quantised, got {tensor.dtype}")
    return tensor
