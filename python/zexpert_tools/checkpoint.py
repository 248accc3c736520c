# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the byte decoder's trainer: written whole or not at all, read with one sentence for what is wrong."""

from __future__ import annotations

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

MAX_CONTEXT_LENGTH = 1 << 20


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
    except Exception as error:
        reason = str(error).strip() if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no checkpoint of a byte decoder: {reason.splitlines()[0]}") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in `path`. Raises ValueError, in one sentence, if it is no trainer's."""
    with reading_checkpoint(path):
        if not path.is_file() and path.exists():
            raise ValueError("it is no file")
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
        trainer.load_state_dict(state)
    return trainer


def load_model(path: Path, device: torch.device | str = "cpu") -> ByteDecoder:
    """The trained model in the checkpoint `path`, in eval mode. Raises ValueError, in one sentence, if it is none."""
    return model_of(path, load_checkpoint(path, device)).to(device).eval()


def model_of(path: Path, state: dict[str, Any]) -> ByteDecoder:
    """Loads the model from `path`. Checks its sizes against the weights before it allocates memory."""
    with reading_checkpoint(path):
        config, weights = ByteDecoderConfig(**state["model_config"]), state["model"]
        if config.num_layers > len(weights) or config.context_length > MAX_CONTEXT_LENGTH:
            raise ValueError(f"its sizes are not those of {len(weights)} weights: {config}")
        with torch.device("meta"):
            check_weights(ByteDecoder(config).state_dict(), weights)
        model = ByteDecoder(config)
        model.load_state_dict(weights)
        return model


def check_weights(wanted: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Raises ValueError if `weights` have other names or shapes than `wanted`, or are not finite."""
    if names := sorted(wanted.keys() ^ weights.keys()):
        others = f", and {len(names) - 1} others" if len(names) > 1 else ""
        raise ValueError(f"{names[0]} is {'missing' if names[0] in wanted else 'unknown'}{others}")
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            raise ValueError(f"{name} must have shape {list(wanted[name].shape)}, got {list(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite")
