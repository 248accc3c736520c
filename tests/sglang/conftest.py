# SPDX-License-Identifier: Apache-2.0
"""SGLang's own classes on CPU tensors, without a server or a model.

Packages that need a GPU to be imported, and that the tested code does not call, are stood in for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # the reference

import transformers

# transformers looks for the packages below when these are first named, and must not find stand-ins.
for name in ("AutoConfig", "AutoProcessor", "AutoTokenizer", "PreTrainedModel"):
    getattr(transformers, name)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that import as mocks."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in ("torchvision", "torchaudio", "torchcodec", "sgl_kernel", "decord"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __name__=spec.name, __version__="0")

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, StandIns())
