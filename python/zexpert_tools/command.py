# SPDX-License-Identifier: Apache-2.0
"""Entry of the `zexpert` command. Imports zexpert late, so that `zexpert doctor` runs where zexpert does not import."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from io import TextIOWrapper
from pathlib import Path

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


def is_busy(samples: int = 10) -> bool:
    """Whether other processes than this one are running, most of the time."""
    try:
        running = []
        for _ in range(samples):
            time.sleep(0.005)
            running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))
    except OSError:
        return False
    return statistics.median(running) > 1


def run() -> None:
    if sys.argv[1:] == ["doctor"]:
        sys.exit(doctor.main())  # needs neither zexpert nor PyTorch: their import may crash the process
    # Where others run, PyTorch's waiting threads must sleep: by default they spin, which takes the processors from the
    # threads that work. On a quiet machine spinning is faster. OpenMP reads the variable when it is loaded.
    if sys.argv[1:2] != ["bench"] and "OMP_WAIT_POLICY" not in os.environ and is_busy():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        from zexpert_tools.cli.app import app
    except ImportError as error:
        if error.name in ("typer", "rich"):
            sys.exit(f"error: the zexpert command needs {error.name}: pip install 'zexpert[cli]'")
        sys.exit(f"error: zexpert cannot be imported: {error}\n`zexpert doctor` looks for the reason.")
    app()
