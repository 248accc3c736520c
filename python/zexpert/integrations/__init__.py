# SPDX-License-Identifier: Apache-2.0
"""zexpert inside other libraries. Each module imports its library, at its first use."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["sglang", "transformers", "vllm"]

if TYPE_CHECKING:
    from zexpert.integrations import sglang, transformers, vllm
else:

    def __getattr__(name: str) -> ModuleType:
        """Imports a module at its first use."""
        if name in __all__:
            return import_module(f"zexpert.integrations.{name}")
        raise AttributeError(f"module 'zexpert.integrations' has no attribute {name!r}")
