# SPDX-License-Identifier: Apache-2.0
"""Entry of the `zexpert` command. Imports zexpert late, so that `zexpert doctor` runs where zexpert does not import."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper

from zexpert_tools.cli import doctor


def main() -> None:
    """Runs the command. Where an import fails, prints one sentence that says why."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader of a pipe ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # print a question mark for what the terminal cannot show
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"error: the output cannot be written: {error.strerror or error}")


def run() -> None:
    if sys.argv[1:] == ["doctor"]:
        sys.exit(doctor.main())  # needs neither zexpert nor PyTorch: their import may crash the process
    if sys.argv[1:2] != ["bench"]:  # which measures PyTorch with its defaults
        # Waiting threads sleep. By default they spin, which slows a busy machine down.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from zexpert_tools.cli.app import app
    except ImportError as error:
        if error.name in ("typer", "rich"):
            sys.exit(f"error: the zexpert command needs {error.name}: pip install 'zexpert[cli]'")
        sys.exit(f"error: zexpert cannot be imported: {error}\n`zexpert doctor` looks for the reason.")
    app()
