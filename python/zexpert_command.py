# SPDX-License-Identifier: Apache-2.0
"""The `zexpert` command's entry, outside of the package: a package that cannot be imported can still be diagnosed."""

from __future__ import annotations

import importlib.util
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Runs the command; where an import fails, its doctor alone, or tells so in one sentence."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end as other commands do where nobody reads on
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal or a pipe cannot show is no reason to stop
    try:
        from zexpert.cli.app import app
    except Exception as error:
        if sys.argv[1:2] == ["doctor"]:
            sys.exit(load_doctor().main())
        if not isinstance(error, ImportError):
            raise
        if error.name in ("typer", "rich"):
            sys.exit(f"error: the zexpert command needs {error.name}: pip install 'zexpert[cli]'")
        sys.exit(f"error: zexpert cannot be imported: {error}\n`zexpert doctor` looks for the reason.")
    app()


def load_doctor() -> ModuleType:
    """zexpert.cli.doctor, which needs nothing but Python, without importing the package around it."""
    path = Path(__file__).parent / "zexpert" / "cli" / "doctor.py"
    spec = importlib.util.spec_from_file_location("zexpert_doctor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
