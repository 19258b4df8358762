"""Looks into the persistent tier for a restore that memory cannot serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from snapshotd.errors import SnapshotdError
from snapshotd.flow.errands import look
from snapshotd.metadata import Stored

#: The pause before it is looked again, after it could not be.
PAUSE_S: Final = 2.0

#: What was seen of a job, or why nothing could be.
Seen = Callable[[str, Stored | None, str], None]


class Lookout:
    """One look at a time for each job that the board wants one for."""

    def __init__(self, url: str, seen: Seen, watch: Callable[[asyncio.Task[None]], None]) -> None:
        self._url = url
        self._seen = seen
        self._watch = watch
        self._looking: set[str] = set()

    def pursue(self, wanted: frozenset[str]) -> None:
        """Begin to look for those jobs."""
        for job in wanted - self._looking:
            self._looking.add(job)
            self._watch(asyncio.get_running_loop().create_task(self._look(job)))

    async def _look(self, job: str) -> None:
        stored, error = await self._looked(job)
        if error:
            self._seen(job, None, error)
            await asyncio.sleep(PAUSE_S)
        self._looking.discard(job)
        self._seen(job, stored, error)

    async def _looked(self, job: str) -> tuple[Stored | None, str]:
        try:
            return await look(self._url, job), ""
        except SnapshotdError as error:
            return None, str(error)
