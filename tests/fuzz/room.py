"""A slot's memory in a directory of its own, and an eye on every file that is touched meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from snapshotd.core.slot import SlotMachine
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.intake import Intake
from snapshotd.flow.vault import Vault
from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.metadata import (
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    Orders,
    SlotFacts,
    Version,
)

T = TypeVar("T")

#: Of all segments of a room: what an input may make the daemon allocate at most.
BUDGET_BYTES = 4 << 20

HERE = Home("n0", 0)
GROUP = Group(tuple(Member(i, Home(f"n{i}", 0)) for i in range(3)), 1)
VERSION = Version(5, 1)

_CHANGING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"}
#: What the kernel says of memory and descriptors, to whoever asks.
_HOW_MUCH_IS_LEFT = ("/proc/meminfo", "/proc/self/", "/sys/fs/cgroup/")
_watching: list[list[str]] = []
_runner = asyncio.Runner()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in _CHANGING or (event == "open" and isinstance(arguments[0], (str, bytes, Path))):
        _watching[-1].append(os.fsdecode(arguments[0]))


sys.addaudithook(_hook)


@contextmanager
def watched(allowed: Path) -> Iterator[None]:
    """No file outside `allowed` is opened, made, renamed or removed within the context."""
    touched: list[str] = []
    _watching.append(touched)
    try:
        yield
    finally:
        _watching.pop()
    own = (
        *_HOW_MUCH_IS_LEFT,
        str(allowed),
        sys.prefix,
        sys.base_prefix,
        str(Path(__file__).parents[2]),
    )
    strange = [p for p in touched if Path(p).is_absolute() and not p.startswith(own)]
    assert not strange, f"files outside of {allowed} were touched: {strange}"
    for path in touched:
        if path.startswith(str(allowed)):
            inside = os.path.normpath(path)
            assert inside.startswith(str(allowed)), f"{path} leads out of {allowed}"


@contextmanager
def room() -> Iterator[Path]:
    """A directory that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="snapshotd-fuzz-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the one loop of this process, and leave no task or thread of it behind."""

    async def whole() -> T:
        asyncio.get_running_loop().set_default_executor(threads)
        try:
            return await work
        finally:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    with ThreadPoolExecutor() as threads:
        return _runner.run(whole())


class Memory:
    """One slot's arena, machine and vault, as the SMP's program puts them together."""

    def __init__(self, directory: Path, home: Home = HERE) -> None:
        self.shm = directory
        self.machine = SlotMachine(home, 2)
        self.arena = Arena(directory / "slot-0", Budget(directory, BUDGET_BYTES))
        self.vault = Vault(self.arena, self.machine, "test", 2)
        self.conduct = Conduct()
        self.intake = Intake(self.vault, self.machine, self.conduct)

    async def seal(self, shard: int, image: bytes, version: Version = VERSION) -> None:
        segment = await self.vault.begin_data("job", shard, version, len(image))
        with segment.image(len(image)) as view:
            view[:] = image
        holding = await self.vault.seal_data(segment, GROUP.size, len(image), 0)
        self.vault.enter(segment)
        self.machine.sealed(holding)


def job(group: Group = GROUP) -> JobFacts:
    """A job of three ranks in its second life, with a restore point."""
    decision = Decision(
        DecisionId(5, "n0"), "job", group.size, (group,), ("i0", "i1", "i2"), restore=Version(4, 0)
    )
    return JobFacts("job", group.size, 5, 5, VERSION, 5, decision)


def orders(peers: dict[Home, SlotFacts] | None = None) -> Orders:
    return Orders((job(),), peers or {})
