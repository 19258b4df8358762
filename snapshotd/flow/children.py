"""The SMP processes of a node: one a slot, exec'd, started again with back-off when they die."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence

from snapshotd.wire.points import point

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 10.0
#: An SMP that ran this long was well; the next death starts the back-off anew.
STEADY_S = 30.0
STOP_GRACE_S = 5.0


class Children:
    """Starts, watches and stops SMPs."""

    def __init__(self, arguments: Callable[[int], Sequence[str]]) -> None:
        self._arguments = arguments
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    def ensure(self, slot: int) -> None:
        """Have an SMP for a slot from now on."""
        if slot not in self._keepers:
            self._keepers[slot] = asyncio.get_running_loop().create_task(self._keep(slot))

    @property
    def pids(self) -> dict[int, int]:
        """Process id by slot, of those that run."""
        return {slot: p.pid for slot, p in self._processes.items() if p.returncode is None}

    async def _keep(self, slot: int) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            began_s = time.monotonic()
            became = await self._lived(slot)
            if time.monotonic() - began_s > STEADY_S:
                pause_s = FIRST_PAUSE_S
            log.error("the SMP of slot %d %s; again in %.1f s", slot, became, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(LAST_PAUSE_S, pause_s * 2)

    async def _lived(self, slot: int) -> str:
        """Start an SMP and wait for its end; what became of it, in words."""
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *self._arguments(slot), stdin=asyncio.subprocess.DEVNULL
            )
        except OSError as error:  # the node is out of descriptors, processes or memory
            return f"could not be started: {error.strerror}"
        self._processes[slot] = process
        point("supervisor.child.started")
        code = await process.wait()
        point("supervisor.child.ended")
        return f"ended with {code}"

    async def stop(self) -> None:
        """End all SMPs: asked first, killed after a grace."""
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        running = [p for p in self._processes.values() if p.returncode is None]
        for process in running:
            process.terminate()
        point("supervisor.stop.asked")
        if not running:
            return
        _, late = await asyncio.wait(
            [asyncio.create_task(p.wait()) for p in running], timeout=STOP_GRACE_S
        )
        for process in running if late else ():
            if process.returncode is None:
                process.kill()
                await process.wait()
