# SPDX-License-Identifier: Apache-2.0
"""Runners: the way of tokens through routing, experts and epilogue."""

from zexpert.runner.chunking_moe_runner import ChunkingMoERunner
from zexpert.runner.default_moe_runner import DefaultMoERunner
from zexpert.runner.expert_parallel_moe_runner import ExpertParallelMoERunner
from zexpert.runner.moe_runner import MoERunner
from zexpert.runner.moe_runner_base import MoERunnerBase
from zexpert.runner.tensor_parallel_moe_runner import TensorParallelMoERunner

__all__ = [
    "ChunkingMoERunner",
    "DefaultMoERunner",
    "ExpertParallelMoERunner",
    "MoERunner",
    "MoERunnerBase",
    "TensorParallelMoERunner",
]
