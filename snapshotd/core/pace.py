"""When to start work on a version, and when to try it again."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from snapshotd.metadata import Version

RETRY_FIRST_S: Final = 0.1
RETRY_LAST_S: Final = 2.0
#: For facts to tell of what was done, before it is done once more.
HEARSAY_S: Final = 1.0


class OfVersion(Protocol):
    """Work that concerns one version of a job."""

    @property
    def job(self) -> str: ...

    @property
    def version(self) -> Version: ...


Task = TypeVar("Task", bound=OfVersion)


@dataclass(slots=True)
class _Pause:
    until_s: float
    delay_s: float


_Key = tuple[str, Version]


class Pace(Generic[Task]):
    """One piece of work on a version at a time, and pauses after it, longer after each failure."""

    def __init__(self) -> None:
        self._running: set[_Key] = set()
        self._pauses: dict[_Key, _Pause] = {}
        self._done: set[_Key] = set()
        self._judged_s = float("-inf")

    def startable(self, tasks: Iterable[Task], now_s: float) -> list[Task]:
        """Those tasks that are to be started now; they count as running from here on."""
        self._judged_s = now_s
        for key in self._done:
            # The facts that say so come a moment later; until then it is not done again.
            self._pauses[key] = _Pause(now_s + HEARSAY_S, RETRY_FIRST_S)
        self._done.clear()
        tasks = list(tasks)
        self._forget_what_is_over({_key(task) for task in tasks}, now_s)
        started = [task for task in tasks if self._free(_key(task), now_s)]
        self._running.update(_key(task) for task in started)
        return started

    def done(self, task: Task) -> None:
        """It has succeeded."""
        self._running.discard(_key(task))
        self._pauses.pop(_key(task), None)
        self._done.add(_key(task))

    def failed(self, task: Task, now_s: float) -> None:
        """It has not, and is tried again after a pause."""
        key = _key(task)
        self._running.discard(key)
        last = self._pauses.get(key)
        delay_s = min(RETRY_LAST_S, last.delay_s * 2) if last else RETRY_FIRST_S
        self._pauses[key] = _Pause(now_s + delay_s, delay_s)

    def forget(self, job: str, version: Version) -> None:
        """What was tried before does not count."""
        self._pauses.pop((job, version), None)

    def wakes_s(self) -> list[float]:
        """When pauses end, those of the past left out."""
        return [p.until_s for p in self._pauses.values() if p.until_s > self._judged_s]

    def _forget_what_is_over(self, wanted: Container[_Key], now_s: float) -> None:
        """Nobody says that an image was given up before it was sealed; its tasks just end."""
        self._pauses = {
            key: pause
            for key, pause in self._pauses.items()
            if pause.until_s > now_s or key in wanted or key in self._running
        }

    def _free(self, key: _Key, now_s: float) -> bool:
        pause = self._pauses.get(key)
        return key not in self._running and (pause is None or now_s >= pause.until_s)


def _key(task: OfVersion) -> _Key:
    return (task.job, task.version)
