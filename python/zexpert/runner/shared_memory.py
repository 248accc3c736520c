# SPDX-License-Identifier: Apache-2.0
"""Memory that all ranks of a group can write: on GPUs symmetric memory, on CPUs shared memory of one host."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from zexpert.runner.expert_group import ExpertGroup

ALIGNMENT = 256  # bytes


class SharedMemory:
    """Arrays for the exchange of token rows, of every rank. All ranks make it together; the host waits.

    Exchanges must take turns: one that writes `rows`, `ids` and `weights`, then one that writes `sums` and
    `weight_sums`, each with a barrier behind it, and a rank must have read what an exchange brought before it starts
    the next. Then no rank overwrites what another still reads: the barrier before says that it was read.

    Args:
        group: the P ranks.
        device: of the arrays.
        dtype: of rows.
        max_tokens: M, most tokens of a rank.
        hidden_size: H.
        top_k: K.

    Attributes:
        rows, sums: of each rank, [P, M, H].
        ids: of each rank, [P, M, K] int32.
        weights, weight_sums: of each rank, [P, M, K], in the dtype of routing weights.
        validity: [1] float32; NaN once a rank did not come.
        side_stream: on a GPU, for what runs while rows travel.

    Raises:
        RuntimeError: the ranks cannot share memory.
    """

    def __init__(
        self,
        group: ExpertGroup,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int,
        hidden_size: int,
        top_k: int,
    ) -> None:
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        row_shape, slot_shape = (group.size, max_tokens, hidden_size), (group.size, max_tokens, top_k)
        layout = {
            "signals": ((group.size,), torch.int64),
            "rows": (row_shape, dtype),
            "sums": (row_shape, dtype),
            "ids": (slot_shape, torch.int32),
            "weights": (slot_shape, weight_dtype),
            "weight_sums": (slot_shape, weight_dtype),
        }
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}
        steps = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
        self.group = group
        self.timeout_ms = max(1, int(group.timeout(device).total_seconds() * 1000))
        with torch.inference_mode(False), torch.no_grad():
            open_segments = open_cuda_segments if device.type == "cuda" else open_cpu_segments
            segments, self._owner = open_segments(group, device, sum(steps))
            arrays: dict[str, list[Tensor]] = {}
            offset = 0
            for (name, (shape, array_dtype)), step in zip(layout.items(), steps, strict=True):
                parts = (segment[offset : offset + sizes[name]] for segment in segments)
                arrays[name] = [part.view(array_dtype).view(shape) for part in parts]
                offset += step
            self.signals, self.rows, self.sums = arrays["signals"], arrays["rows"], arrays["sums"]
            self.ids, self.weights, self.weight_sums = arrays["ids"], arrays["weights"], arrays["weight_sums"]
            self.epoch = torch.zeros(1, dtype=torch.int64, device=device)
            self.validity = torch.ones(1, device=device)
            self.absent_rank = torch.full((1,), -1, dtype=torch.int32, pin_memory=device.type == "cuda")
            if device.type == "cuda":
                self.side_stream = torch.cuda.Stream(device, priority=-1)
                torch.cuda.synchronize(device)
        group.gather_objects(None)  # nobody signals before all signals are 0

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        num_local_experts: int,
        most_multiprocessors: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See zexpert.ops.moe_dispatch."""
        slot_rows, row_tokens = torch.ops.zexpert.moe_dispatch(
            hidden_states,
            topk_ids,
            topk_weights,
            self.rows,
            self.ids,
            self.weights,
            self.group.rank,
            num_local_experts,
            most_multiprocessors=most_multiprocessors,
        )
        return slot_rows, row_tokens

    def combine(
        self,
        rows: Tensor,
        slot_rows: Tensor,
        topk_weights: Tensor | None,
        out: list[Tensor],
        most_multiprocessors: int = 0,
    ) -> None:
        """See zexpert.ops.moe_combine."""
        torch.ops.zexpert.moe_combine(
            rows, slot_rows, topk_weights, out, self.group.rank, most_multiprocessors=most_multiprocessors
        )

    def barrier(self) -> None:
        """See zexpert.ops.rank_barrier."""
        with self.group.exchanging():
            torch.ops.zexpert.rank_barrier(
                self.signals, self.epoch, self.validity, self.absent_rank, self.group.rank, self.timeout_ms
            )

    def check(self) -> None:
        """Raises RuntimeError if a rank did not come to a barrier that has ended. Waits for nothing."""
        absent_rank = int(self.absent_rank)
        if absent_rank >= 0:
            with self.group.exchanging():
                raise RuntimeError(f"rank {absent_rank} did not come within {self.timeout_ms} ms, or gave up")

    def own(self, arrays: list[Tensor]) -> Tensor:
        """This rank's array as a matrix."""
        return arrays[self.group.rank].flatten(0, 1)

    def received(self, arrays: list[Tensor]) -> Tensor:
        """A copy of it, NaN if a rank did not come."""
        return self.own(arrays) * self.validity.squeeze()


def open_cuda_segments(group: ExpertGroup, device: torch.device, num_bytes: int) -> tuple[list[Tensor], object]:
    """Zeros of `num_bytes` bytes in the memory of each rank's GPU, and what keeps them alive."""
    try:
        from torch.distributed import _symmetric_memory

        segment = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        segment.zero_()
        handle = _symmetric_memory.rendezvous(segment, group.process_group)
        segments = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(group.size)]
    except (ImportError, AttributeError, RuntimeError) as error:
        raise RuntimeError(
            'the exchange "symmetric" needs GPUs that can write each other\'s memory, and '
            f"torch.distributed._symmetric_memory to map it: {error}"
        ) from error
    return segments, (segment, handle)


def open_cpu_segments(group: ExpertGroup, device: torch.device, num_bytes: int) -> tuple[list[Tensor], object]:
    """The same in memory that the processes of one host share."""
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    segments: list[Tensor] = []
    problem: str | None = None
    with tempfile.NamedTemporaryFile(prefix="zexpert-", dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            problem = f"{folder} has no room for {num_bytes} bytes: {error}"
        paths = group.gather_objects(file.name)
        missing = [path for path in paths if not Path(path).exists()]
        if missing:
            problem = f"{missing[0]} of another rank does not exist here"
        if problem is None:
            segments = [torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path in paths]
        # When all have answered, all have mapped the file, which can go.
        problems = [found for found in group.gather_objects(problem) if found is not None]
    if problems:
        raise RuntimeError(f'the exchange "symmetric" needs CPUs of one host that share memory: {problems[0]}')
    return segments, None


_memories: WeakKeyDictionary[dist.ProcessGroup, dict[object, SharedMemory]] = WeakKeyDictionary()


def shared_memory(
    group: ExpertGroup,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    hidden_size: int,
    top_k: int,
    lane: int = 0,
) -> SharedMemory:
    """The group's memory for these sizes, which its layers use in turn. Made at the first call, by all ranks. Each lane
    has its own.

    Raises:
        RuntimeError: the ranks cannot share memory; or it would be made while a CUDA graph is captured.
    """
    memories = _memories.setdefault(group.process_group, {})
    key = (device, dtype, max_tokens, hidden_size, top_k, lane)
    memory = memories.get(key)
    if memory is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'the exchange "symmetric" must allocate memory outside of a CUDA graph: call the layer once before you '
                "capture it"
            )
        memory = memories[key] = SharedMemory(group, device, dtype, max_tokens, hidden_size, top_k)
    return memory


def shared_memories(group: ExpertGroup) -> list[SharedMemory]:
    """All memory of the group so far."""
    return list(_memories.get(group.process_group, {}).values())
