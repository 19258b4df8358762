"""How much memory the control groups of this process leave it, cgroup v2 or v1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: cgroup v1 says "no limit" with the largest multiple of a page; nobody has an exbibyte.
_UNLIMITED_BYTES: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class _Files:
    """Names that differ between the versions."""

    limit: str
    usage: str
    reclaimable: str


_V1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2: Final = _Files("memory.max", "memory.current", "inactive_file")


def cgroup_left_bytes(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes until the tightest memory limit on the way from this process's cgroup to the root.

    File pages that the kernel can drop at once do not count as used.

    Args:
        membership: the kernel's list of this process's cgroups.
        mount: where they are mounted.

    Returns:
        None where there is no limit, or no cgroup.
    """
    found = (_left_bytes(*place) for place in _places(membership, mount))
    return min((left for left in found if left is not None), default=None)


def cgroup_limit_bytes(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The tightest memory limit itself; arguments and None as for `cgroup_left_bytes`."""
    found = (_limit_bytes(*place) for place in _places(membership, mount))
    return min((limit for limit in found if limit is not None), default=None)


def _places(membership: Path, mount: Path) -> Iterator[tuple[Path, _Files]]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    yield from _directories(lines, mount)


def _directories(lines: list[str], mount: Path) -> Iterator[tuple[Path, _Files]]:
    """Every directory that may hold a limit; within a container most are not there."""
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, files = mount / "memory", _V1
        elif number == "0" and not controllers:
            root, files = mount, _V2
        else:
            continue
        inner = Path(path.lstrip("/"))
        for part in (inner, *inner.parents):
            yield root / part, files


def _left_bytes(directory: Path, files: _Files) -> int | None:
    limit = _limit_bytes(directory, files)
    usage = _number(directory / files.usage)
    if limit is None or usage is None:
        return None
    return max(0, limit - usage + _reclaimable(directory / "memory.stat", files.reclaimable))


def _limit_bytes(directory: Path, files: _Files) -> int | None:
    limit = _number(directory / files.limit)
    return None if limit is None or limit >= _UNLIMITED_BYTES else limit


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", and where there is no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(v) for k, _, v in (line.partition(" ") for line in lines) if k == key), 0)
