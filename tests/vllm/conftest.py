# SPDX-License-Identifier: Apache-2.0
"""vLLM's own classes on CPU tensors, without a server or a model."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # the reference

import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

# vLLM's platform must be known before its layers are imported.
vllm.platforms._current_platform = CpuPlatform()


@pytest.fixture(scope="session")
def vllm_config() -> Iterator[object]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    config = VllmConfig()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{folder}/store", backend="gloo"
        )
        initialize_model_parallel(1)
        yield config


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from zexpert.integrations.vllm import register

    monkeypatch.setenv("ZEXPERT_VLLM", "1")
    register()
