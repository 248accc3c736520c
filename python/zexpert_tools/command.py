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


def choose_wait_policy() -> None:
    """Chooses how PyTorch's threads wait for each other, unless the environment says so; OpenMP reads it when it loads.

    By default they spin for milliseconds. On a busy machine that takes the processors from the threads that work, and
    a step of the demo takes ten times as long: there they sleep. Else they spin for microseconds, which is as fast.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        name, value = ("OMP_WAIT_POLICY", "PASSIVE") if is_busy() else ("GOMP_SPINCOUNT", "10000")
        os.environ[name] = value


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
    if sys.argv[1:2] != ["bench"]:  # which measures PyTorch with its defaults
        choose_wait_policy()
    try:
        from zexpert_tools.cli.app import app
    except ImportError as error:
        if error.name in ("typer", "rich"):
            sys.exit(f"error: the zexpert command needs {error.name}: pip install 'zexpert[cli]'")
        sys.exit(f"error: zexpert cannot be imported: {error}\n`zexpert doctor` looks for the reason.")
    app()
