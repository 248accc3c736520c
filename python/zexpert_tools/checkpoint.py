# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the byte decoder's trainer: written whole or not at all, read with one sentence for what is wrong."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zexpert_tools.byte_decoder import ByteDecoder, ByteDecoderConfig
from zexpert_tools.files import whole_file
from zexpert_tools.trainer import Trainer, TrainerConfig

MAX_SIZE = 1 << 20


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Writes the trainer's state to `path`. An error leaves the file that was there, and no other. Raises OSError."""
    state = io.BytesIO()
    torch.save(trainer.state_dict(), state)  # into memory: PyTorch reports a full disk as an internal error
    with whole_file(path) as partial:
        partial.write_bytes(state.getbuffer())


@contextmanager
def reading_checkpoint(path: Path) -> Iterator[None]:
    """Turns whatever the block raises while it reads the checkpoint `path` into a ValueError of one sentence. What the
    unpickler, a model or an optimizer raises for a file of another kind has no end."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # texts that are not a ValueError's speak of Python and of PyTorch
        reason = str(error).strip() if isinstance(error, ValueError) else "its values do not fit together"
        raise ValueError(f"{path} is not a checkpoint of a byte decoder: {reason.splitlines()[0]}") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in `path`. Raises ValueError, in one sentence, if it is no trainer's."""
    with reading_checkpoint(path):
        if not path.is_file() and path.exists():
            raise ValueError("it is not a file")
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # its text advises to load without care
            raise ValueError("PyTorch cannot read it") from error
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        missing = {"model_config", "model", "optimizer", "generator", "history"} - state.keys()
        if missing:
            raise ValueError(f"it has no {min(missing)}")
        return state


def load_trainer(path: Path, text: Tensor, config: TrainerConfig, device: torch.device | str = "cpu") -> Trainer:
    """A trainer that continues from the checkpoint `path`. Raises ValueError, in one sentence, if it is none."""
    state = load_checkpoint(path, device)
    trainer = Trainer(model_of(path, state).to(device), text, config)
    with reading_checkpoint(path):
        check_training(trainer, state)
        trainer.load_state_dict(state)
    return trainer


def load_model(path: Path, device: torch.device | str = "cpu") -> ByteDecoder:
    """The trained model in the checkpoint `path`, in eval mode. Raises ValueError, in one sentence, if it is none."""
    return model_of(path, load_checkpoint(path, device)).to(device).eval()


def model_of(path: Path, state: dict[str, Any]) -> ByteDecoder:
    """Loads the model from `path`. Checks its sizes against the weights before it allocates memory."""
    with reading_checkpoint(path):
        sizes, weights = state["model_config"], state["model"]
        check_like("model_config", sizes, {})
        check_like("model", weights, {})
        known = [field.name for field in dataclasses.fields(ByteDecoderConfig)]
        if unknown := [name for name in sizes if name not in known]:
            raise ValueError(f"model_config must hold {', '.join(known)}, got {unknown[0]}")
        config = ByteDecoderConfig(**sizes)
        for name, size in {**config.to_dict(), "routed_scaling_factor": 0}.items():
            largest = len(weights) if name == "num_layers" else MAX_SIZE
            if size > largest:
                raise ValueError(f"{name} must be at most {largest}, got {size}")
        with torch.device("meta"):
            wanted = ByteDecoder(config).state_dict()
        check_like("", weights, wanted)
        if unknown := [name for name in weights if name not in wanted]:
            raise ValueError(f"{unknown[0]} is unknown")
        model = ByteDecoder(config)
        model.load_state_dict(weights)
        return model


def check_training(trainer: Trainer, state: dict[str, Any]) -> None:
    """Raises ValueError unless the trainer can continue from `state`, whose model it has."""
    check_like("generator", state["generator"], trainer.generator.get_state())
    check_like("history", state["history"], [])
    for index, record in enumerate(state["history"]):
        name = f"history[{index}]"
        check_like(name, record, {"step": 0, "bits_per_byte": 0.0, "ffn_slots_per_token": 0.0})
        if record.get("held_out_bits_per_byte") is not None:
            check_like(f"{name}.held_out_bits_per_byte", record["held_out_bits_per_byte"], 0.0)
    groups = trainer.optimizer.state_dict()["param_groups"]
    used = ("lr", "betas", "eps", "weight_decay", "params")
    like: dict[str, Any] = {"param_groups": [{name: group[name] for name in used} for group in groups], "state": {}}
    if state["history"]:
        for index, parameter in enumerate(p for group in trainer.optimizer.param_groups for p in group["params"]):
            like["state"][index] = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
    check_like("optimizer", state["optimizer"], like)


def check_like(name: str, value: object, like: object) -> None:
    """Raises ValueError unless `value` is built as `like` is: of its type, with its keys and perhaps others, with its
    elements if it has any, with its shape; floating-point tensors in any precision, and finite."""
    if isinstance(like, Tensor):
        check_tensor_like(name, value, like)
        return
    if type(value) is not type(like) and not (isinstance(value, dict) and isinstance(like, dict)):
        raise ValueError(f"{name} must be of type {type(like).__name__}, got {value!r:.40}")
    if isinstance(value, dict) and isinstance(like, dict):
        for key, part in like.items():
            inner = f"{name}.{key}".removeprefix(".")
            if key not in value:
                raise ValueError(f"{inner} is missing")
            check_like(inner, value[key], part)
    elif isinstance(value, list | tuple) and isinstance(like, list | tuple) and like:
        if len(value) != len(like):
            raise ValueError(f"{name} must have {len(like)} elements, got {len(value)}")
        for index, (element, part) in enumerate(zip(value, like, strict=True)):
            check_like(f"{name}[{index}]", element, part)


def check_tensor_like(name: str, value: object, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {value!r:.40}")
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{name} must be a dense tensor with values")
    has_type = (
        value.is_floating_point() and value.element_size() > 1
        if like.is_floating_point()
        else value.dtype == like.dtype
    )
    if not has_type:
        raise ValueError(f"{name} must be of dtype {like.dtype}, got {value.dtype}")
    if value.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(value.shape)}")
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"{name} must be finite")
