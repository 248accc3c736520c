# SPDX-License-Identifier: Apache-2.0
"""The ranks that share a layer's experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


class ExpertGroup:
    """A process group. Copies of a module share it.

    Args:
        argument: what messages call `group`.
        group: the ranks: a torch.distributed.ProcessGroup that this process is in, or a DeviceMesh of one dimension,
            such as mesh["expert"].

    Attributes:
        process_group: the process group.
        rank: this process's place in it.
        size: P, its number of ranks.

    Raises:
        ValueError: if `group` is neither, or does not hold this process.
    """

    def __init__(self, argument: str, group: dist.ProcessGroup | DeviceMesh) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"{argument} needs torch.distributed.init_process_group to have been called, got {group!r}"
            )
        from torch.distributed.device_mesh import DeviceMesh

        self._meshes: dict[str, DeviceMesh] = {}
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"{argument} must be a process group or one dimension of a DeviceMesh, such as mesh[name], "
                    f"got a mesh of {group.ndim} dimensions"
                )
            self._meshes[group.device_type] = group
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"{argument} must be a process group that this process is in, or a DeviceMesh, got {group!r}"
            )
        self._argument = argument
        self._name = group.group_name
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @property
    def process_group(self) -> dist.ProcessGroup:
        # By name: a reference would keep the group's threads alive after torch.distributed.destroy_process_group, and
        # they must not meet the end of Python.
        group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(self._name)
        return group

    def as_sharded(self, shard: Tensor, dim: int) -> DTensor:
        """The whole of which every rank holds an equal `shard` in dimension `dim`; no data moves."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = self._meshes.get(shard.device.type)
        if mesh is None:
            mesh = self._meshes[shard.device.type] = DeviceMesh.from_group(self.process_group, shard.device.type)
        return DTensor.from_local(shard, mesh, [Shard(dim)], run_check=False)

    def timeout(self, device: torch.device) -> timedelta:
        """How long the group's collectives on the device wait for a rank."""
        backend = self.process_group._get_backend(device)
        timeout: timedelta = backend.options._timeout
        return timeout

    def gather_objects(self, value: T) -> list[T]:
        """What each rank calls this with. The host waits."""
        of_ranks = [value] * self.size
        with self.exchanging():
            dist.all_gather_object(of_ranks, value, group=self.process_group)
        return of_ranks

    def require_agreement(self, **settings: object) -> None:
        """Raises ValueError on every rank unless all ranks call this with the same values. The host waits."""
        of_ranks = self.gather_objects(settings)
        for name, first in of_ranks[0].items():
            for rank, others in enumerate(of_ranks):
                if others.get(name) != first:
                    raise ValueError(
                        f"{name} must be the same on all ranks of {self._argument}, got {first} on rank 0 and "
                        f"{others.get(name)} on rank {rank}"
                    )

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Adds the group's rank to errors of collectives inside it."""
        try:
            yield
        except RuntimeError as error:
            # Gloo has no class of its own. Other classes, such as torch.OutOfMemoryError, are this rank's own errors.
            if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
                raise
            raise RuntimeError(
                f"rank {self.rank} of the {self.size} that share the experts could not exchange rows with the others: "
                f"one of them raised an error, ended, or came later than the process group's timeout: {error}"
            ) from error

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertGroup:
        return self

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"
