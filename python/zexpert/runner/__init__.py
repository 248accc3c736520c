"""Runners: the way of tokens through routing, experts and epilogue."""

from zexpert.runner.chunking_moe_runner import ChunkingMoERunner
from zexpert.runner.default_moe_runner import DefaultMoERunner
from zexpert.runner.moe_runner import MoERunner
from zexpert.runner.moe_runner_base import MoERunnerBase

__all__ = ["ChunkingMoERunner", "DefaultMoERunner", "MoERunner", "MoERunnerBase"]
