# SPDX-License-Identifier: Apache-2.0
"""The library works without the package of the command, zexpert_tools."""

from __future__ import annotations

import re
from pathlib import Path

import zexpert


def test_the_library_imports_no_tool() -> None:
    package = Path(zexpert.__file__).parent
    naming = [path.name for path in package.rglob("*.py") if re.search(r"\bzexpert_tools\b", path.read_text())]
    assert naming in ([], ["__main__.py"])  # `python -m zexpert` is the command
