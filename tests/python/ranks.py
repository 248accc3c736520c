# SPDX-License-Identifier: Apache-2.0
"""Processes that tests run functions on, as ranks of torch.distributed on the CPU."""

from __future__ import annotations

import io
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 30  # seconds for what takes a second or two
TIMEOUT = timedelta(seconds=PATIENCE)


class Ranks:
    """`size` processes, started once for many tests."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.results: Any = context.Queue()
        self.tasks: list[Any] = [context.Queue() for _ in range(size)]
        self.calls = 0
        self.processes = [
            context.Process(target=work, args=(rank, size, str(folder), self.tasks[rank], self.results), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
        """What `function(group, *arguments)` returns on each of the first ranks. Raises if it does on any."""
        self.calls += 1
        for tasks in self.tasks[:num_ranks]:
            tasks.put((self.calls, function, num_ranks, arguments))
        outcomes: dict[int, Any] = {}
        failures = []
        while len(outcomes) < num_ranks:
            try:
                call, rank, error, outcome = self.results.get(timeout=2 * PATIENCE)
            except Empty:
                raise AssertionError(f"of {num_ranks} ranks only {sorted(outcomes)} answered") from None
            if call < self.calls:
                continue  # a late answer to a test that failed
            outcomes[rank] = torch.load(io.BytesIO(outcome), weights_only=False)
            failures += [f"rank {rank}:\n{error}"] if error else []
        assert not failures, "\n".join(failures)
        return [outcomes[rank] for rank in range(num_ranks)]

    def stop(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(PATIENCE)


def work(rank: int, size: int, folder: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    start_rank(rank, size, f"{folder}/rendezvous")
    groups = {n: dist.new_group(list(range(n)), timeout=TIMEOUT) for n in range(1, size + 1)}
    while (task := tasks.get()) is not None:
        call, function, num_ranks, arguments = task
        error, outcome = "", None
        try:
            torch.manual_seed(0)
            outcome = function(groups[num_ranks], *arguments)
        except BaseException:
            error = traceback.format_exc()
        file = io.BytesIO()
        torch.save(outcome, file)
        results.put((call, rank, error, file.getvalue()))
    dist.destroy_process_group()


def start_rank(rank: int, size: int, rendezvous: str, timeout: timedelta = TIMEOUT) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout)
