"""A slot that is short of memory: noted where something does not fit, over when all would again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from snapshotd.core.slot import SlotMachine
from snapshotd.errors import NoRoom
from snapshotd.memory.rooms import Rooms

log = logging.getLogger(__name__)

#: Memory that others take and give back announces itself to nobody.
ROOM_CHECK_S = 3.0


class Shortage:
    """Tells the machine of it, which then does with less.

    Args:
        machine: of the slot.
        rooms: what there is room for.
        start: runs a task beside all others.
    """

    def __init__(
        self,
        machine: SlotMachine,
        rooms: Rooms,
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._machine = machine
        self._rooms = rooms
        self._start = start
        self._waits = False

    def check(self, job: str, image_bytes: int) -> None:
        """A job begins that fits on the node, but perhaps not beside what else is there now."""
        try:
            self._rooms.check_all(image_bytes)
        except NoRoom as error:
            log.warning("job %s begins with less protection: %s", job, error)
            self._machine.no_room(job, image_bytes)

    def note(self, job: str, image_bytes: int) -> None:
        """Something did not fit. What never could is no shortage, and to be refused alone."""
        with contextlib.suppress(NoRoom):
            if not self._machine.stands_in(job):
                self._rooms.check_ever(image_bytes)
            self._machine.no_room(job, image_bytes)

    def watch(self) -> None:
        """Begin to wait for room, where some is lacking."""
        if self._machine.short and not self._waits:
            self._waits = True
            self._start(self._await_room())

    async def _await_room(self) -> None:
        """While memory is short, look now and then whether there is room for everything again."""
        log.warning("memory is short for job(s) %s", ", ".join(sorted(self._machine.short)))
        while self._machine.short:
            await asyncio.sleep(ROOM_CHECK_S)
            for job, image_bytes in list(self._machine.short.items()):
                if self._machine.orders.job(job) is None:
                    self._machine.room(job)
                    continue
                with contextlib.suppress(NoRoom):
                    self._rooms.check_all(image_bytes)
                    self._machine.room(job)
                    log.info("there is room again for all of job %s", job)
        self._waits = False
