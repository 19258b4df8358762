"""What the log says of peers that cannot be reached: once when it begins, once when it ends."""

from __future__ import annotations

import logging
from dataclasses import dataclass


@dataclass(slots=True)
class _Outage:
    since_s: float
    warned: bool


class Reach:
    """Follows the exchanges with each peer.

    Args:
        logger: where it is said.
        patience_s: how long a peer that was never reached may take to start before that is worth
            a warning.
    """

    def __init__(self, logger: logging.Logger, patience_s: float) -> None:
        self._logger = logger
        self._patience_s = patience_s
        self._met: set[str] = set()
        self._outages: dict[str, _Outage] = {}
        self._leaving = False

    def failed(self, node: str, why: str, now_s: float) -> None:
        """An exchange has failed."""
        if self._leaving:
            return
        outage = self._outages.get(node)
        if outage is None:
            outage = self._outages[node] = _Outage(now_s, warned=node in self._met)
            if outage.warned:
                self._logger.warning("%s: not to be reached: %s", node, why)
            else:
                self._logger.info("%s: not up yet, or not to be reached", node)
        elif not outage.warned and now_s - outage.since_s >= self._patience_s:
            outage.warned = True
            self._logger.warning(
                "%s: not reached for %.0f s since this daemon started: %s",
                node,
                now_s - outage.since_s,
                why,
            )

    def reached(self, node: str, now_s: float) -> None:
        """An exchange has succeeded."""
        outage = self._outages.pop(node, None)
        if outage is not None and not self._leaving:
            back = "back" if node in self._met else "there"
            self._logger.info("%s: is %s, after %.1f s", node, back, now_s - outage.since_s)
        self._met.add(node)

    def forget(self, node: str) -> None:
        """It is no peer any more."""
        self._met.discard(node)
        self._outages.pop(node, None)

    def leave(self) -> None:
        """This daemon stops, and perhaps all do: from now on silence is no news."""
        self._leaving = True
