# SPDX-License-Identifier: Apache-2.0
"""zexpert inside other libraries, one module each. A module imports its library; this package imports none."""

from importlib import import_module
from types import ModuleType

MODULES = ("sglang", "transformers", "vllm")


def __getattr__(name: str) -> ModuleType:
    """Imports a module at its first use."""
    if name in MODULES:
        return import_module(f"zexpert.integrations.{name}")
    raise AttributeError(f"module 'zexpert.integrations' has no attribute {name!r}")
