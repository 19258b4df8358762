"""Whether a job's snapshots will fit on this node, decided from numbers before its first step."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from snapshotd.errors import NoRoom
from snapshotd.memory.allocation import PAGE_BYTES, explain, pages
from snapshotd.memory.arena import capacity_bytes
from snapshotd.memory.budget import Budget
from snapshotd.memory.cgroup import cgroup_left_bytes, cgroup_limit_bytes
from snapshotd.memory.records import parity_record_bytes, seal_record_bytes
from snapshotd.memory.segment import DESCRIPTORS_PER_SEGMENT
from snapshotd.memory.segment_file import file_bytes
from snapshotd.wire.protocol import grain_bytes

#: Left to sockets, logs and the interpreter.
_OTHER_DESCRIPTORS: Final = 64

#: The job's name is not known here; names are far shorter.
_JOB_NAME_CHARACTERS: Final = 256


@dataclass(frozen=True, slots=True)
class Need:
    """What one slot will still take.

    Attributes:
        bytes: shared memory.
        descriptors: open files of its process.
        detail: what the bytes are for, for people.
    """

    bytes: int
    descriptors: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Room:
    """What is left.

    Attributes:
        budget_left_bytes: of the daemon's memory_budget.
        tmpfs_free_bytes: of the file system of shm_dir.
        memory_available_bytes: of the machine, without swapping.
        cgroup_left_bytes: until the tightest limit of a control group; None without one.
        descriptors_left: of this process's limit of open files.
    """

    budget_left_bytes: int
    tmpfs_free_bytes: int
    memory_available_bytes: int
    cgroup_left_bytes: int | None
    descriptors_left: int


def snapshot_need(
    image_bytes: int, generations: int, n: int, m: int, *, allocated_bytes: int = 0
) -> Need:
    """What a shard takes on its node: per generation about S * (1 + m / (n - m)).

    Each generation is one data segment of S and m parity segments of S / (n - m), with the slack
    and the records that the arena adds.

    Args:
        image_bytes: S, the largest of the group.
        generations: that are kept at once, the one in progress included.
        n: members of the group, at least 1.
        m: parity blocks a stripe, 0 .. n-1.
        allocated_bytes: what the slot has already; it is used again.

    Raises:
        ValueError: an m or n that no group has.
    """
    if not 0 <= m < n:
        raise ValueError(f"n = {n}, m = {m}: 0 <= m < n expected")
    per_generation = _data_bytes(image_bytes) + m * _parity_bytes(image_bytes, n, n - m)
    total = generations * per_generation
    detail = (
        f"{generations} generations of a shard of {image_bytes} bytes in a group of {n} with "
        f"parity {m}, {allocated_bytes} of {total} bytes are allocated"
    )
    descriptors = generations * (1 + m) * DESCRIPTORS_PER_SEGMENT + _OTHER_DESCRIPTORS
    return Need(max(0, total - allocated_bytes), descriptors, detail)


def check_room(need: Need, room: Room) -> None:
    """Refuse what will not fit.

    Raises:
        NoRoom: everything that does not suffice, with all the numbers and a remedy for each.
    """
    short = [
        (f"{name} has {left}", remedy)
        for name, wanted, left, remedy in _limits(need, room)
        if left is not None and left < wanted
    ]
    if not short:
        return
    facts = "; ".join(fact for fact, _ in short)
    detail = f" ({need.detail})" if need.detail else ""
    raise NoRoom(
        f"snapshots need {need.bytes} bytes and {need.descriptors} descriptors{detail}: {facts}; "
        f"all that is left: {_describe(room)}",
        "; ".join(remedy for _, remedy in short),
    )


def measure_room(shm_dir: Path, budget: Budget) -> Room:
    """Ask the system what is left now.

    Raises:
        SnapshotdError: `shm_dir` cannot be looked at.
    """
    try:
        stat = os.statvfs(shm_dir)
    except OSError as error:
        raise explain(error, shm_dir) from error
    return Room(
        budget_left_bytes=budget.left_bytes(),
        tmpfs_free_bytes=stat.f_bavail * stat.f_frsize,
        memory_available_bytes=psutil.virtual_memory().available,
        cgroup_left_bytes=cgroup_left_bytes(),
        descriptors_left=_descriptors_left(),
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a node has at all, bytes.

    Attributes:
        memory: of the machine.
        cgroup: tightest limit of a control group; None without one.
        tmpfs: size of the file system of shm_dir.
    """

    memory: int
    cgroup: int | None
    tmpfs: int


def measure_limits(shm_dir: Path) -> Limits:
    """Ask the system.

    Raises:
        SnapshotdError: `shm_dir` cannot be looked at.
    """
    try:
        stat = os.statvfs(shm_dir)
    except OSError as error:
        raise explain(error, shm_dir) from error
    return Limits(
        memory=psutil.virtual_memory().total,
        cgroup=cgroup_limit_bytes(),
        tmpfs=stat.f_blocks * stat.f_frsize,
    )


def beyond(budget_bytes: int, limits: Limits) -> tuple[str, ...]:
    """A sentence for each limit that a memory_budget is above: it can never be used up."""
    known = (
        ("the machine's memory", limits.memory, "lower it"),
        ("the memory limit of the control group", limits.cgroup, "lower it, or raise that limit"),
        ("the tmpfs of shm_dir", limits.tmpfs, "lower it, or enlarge the tmpfs"),
    )
    return tuple(
        f"memory_budget of {budget_bytes} bytes is above {name} of {limit} bytes: {remedy}"
        for name, limit, remedy in known
        if limit is not None and budget_bytes > limit
    )


def _limits(need: Need, room: Room) -> tuple[tuple[str, int, int | None, str], ...]:
    """Name, what is needed of it, what is left of it, what to do."""
    return (
        (
            "memory_budget",
            need.bytes,
            room.budget_left_bytes,
            "raise memory_budget, or free a job's memory with `snapshotd drop JOB`",
        ),
        (
            "tmpfs of shm_dir",
            need.bytes,
            room.tmpfs_free_bytes,
            "enlarge it (mount -o remount,size=...) or point shm_dir at a larger one",
        ),
        (
            "free memory",
            need.bytes,
            room.memory_available_bytes,
            "free memory of the machine, or use a larger one",
        ),
        (
            "memory limit of the control group",
            need.bytes,
            room.cgroup_left_bytes,
            "raise it (MemoryMax=, the container's memory limit)",
        ),
        (
            "limit of open files",
            need.descriptors,
            room.descriptors_left,
            "raise it (ulimit -n, LimitNOFILE=)",
        ),
    )


def _describe(room: Room) -> str:
    limit = "none" if room.cgroup_left_bytes is None else str(room.cgroup_left_bytes)
    return (
        f"budget {room.budget_left_bytes}, tmpfs {room.tmpfs_free_bytes}, memory "
        f"{room.memory_available_bytes}, control group {limit} bytes, "
        f"{room.descriptors_left} descriptors"
    )


def _data_bytes(image_bytes: int) -> int:
    record = seal_record_bytes("x" * _JOB_NAME_CHARACTERS, image_bytes)
    return file_bytes(capacity_bytes(image_bytes), max(PAGE_BYTES, pages(record)))


def _parity_bytes(image_bytes: int, n: int, k: int) -> int:
    # Blocks are whole grains, the unit of checksums.
    grain = grain_bytes(image_bytes)
    block = min(image_bytes, -(-image_bytes // (k * grain)) * grain)
    record = parity_record_bytes("x" * _JOB_NAME_CHARACTERS, [image_bytes] * n, block)
    return file_bytes(capacity_bytes(block), max(PAGE_BYTES, pages(record)))


def _descriptors_left() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return 1 << 30
    return max(0, limit - len(list(Path("/proc/self/fd").iterdir())))
