"""The background scrub: reads what is sealed again and again, so that a flipped bit is found early.

A damaged block is quarantined by the vault; core then has it coded or rebuilt from the group.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from snapshotd.errors import DamagedBytes, RequestError
from snapshotd.flow.vault import Vault
from snapshotd.metadata import Version
from snapshotd.rpc.serving import What

log = logging.getLogger(__name__)

#: Between two rounds, so that a slot with little or nothing to verify does not spin.
ROUND_PAUSE_S: Final = 5.0


class Scrub:
    """Verifies all sealed segments of a slot, round after round.

    Args:
        vault: the slot's.
        bytes_per_s: bound of the reading, on average over a segment; 0 turns the scrub off.
    """

    def __init__(self, vault: Vault, bytes_per_s: int) -> None:
        self._vault = vault
        self._bytes_per_s = bytes_per_s

    async def run(self) -> None:
        """For ever."""
        while self._bytes_per_s > 0:
            await asyncio.sleep(ROUND_PAUSE_S)
            for job, version, what in self._vault.held():
                await self._verify(job, version, what)
        await asyncio.Event().wait()

    async def _verify(self, job: str, version: Version, what: What) -> None:
        try:
            with self._vault.reading(job, version, what) as segment:
                await asyncio.to_thread(segment.verify)
                size_bytes = segment.size_bytes
        except RequestError:
            return  # freed meanwhile, as generations are
        except DamagedBytes as error:
            log.error("the scrub found damage: %s", error)
            return
        await asyncio.sleep(size_bytes / self._bytes_per_s)
