"""The three questions about memory that a slot asks: may a job begin, is it short, is there room.

What can never fit is refused before the first step. What does not fit now, because others use
the memory, is done with less: fewer generations, less parity, in the end local snapshots only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.memory.preflight import check_room, measure_limits, measure_room, snapshot_need


@dataclass(frozen=True, slots=True)
class Rooms:
    """Judges one slot's memory; every question raises NoRoom for a no, with all the numbers."""

    budget: Budget
    arena: Arena
    generations: int
    group_size: int
    parity: int

    def check_ever(self, image_bytes: int) -> None:
        """Whether a job of this size fits on the node while nobody else uses it.

        Raises:
            NoRoom: it does not.
        """
        shm_dir = self.budget.shm_dir
        limits = measure_limits(shm_dir)
        empty = replace(
            measure_room(shm_dir, self.budget),
            budget_left_bytes=self.budget.limit_bytes,
            tmpfs_free_bytes=limits.tmpfs,
            memory_available_bytes=limits.memory,
            cgroup_left_bytes=None,
        )
        need = snapshot_need(image_bytes, self.generations, self.group_size, self.parity)
        check_room(need, empty)

    def check_begin(self, image_bytes: int) -> None:
        """Whether a job of this size may begin: `check_ever`, and its least part fits now.

        Raises:
            NoRoom: it may not.
        """
        self.check_ever(image_bytes)
        allocated = self.arena.allocated_bytes
        least = snapshot_need(image_bytes, 2, 1, 0, allocated_bytes=allocated)
        check_room(least, measure_room(self.budget.shm_dir, self.budget))

    def check_all(self, image_bytes: int) -> None:
        """Whether all generations and all parity fit now.

        Raises:
            NoRoom: they do not.
        """
        need = snapshot_need(
            image_bytes,
            self.generations,
            self.group_size,
            self.parity,
            allocated_bytes=self.arena.allocated_bytes,
        )
        check_room(need, measure_room(self.budget.shm_dir, self.budget))
