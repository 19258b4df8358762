"""How other nodes behave: who sent what no honest node sends is not heard for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from snapshotd.core.trust import Misdeed, Trust
from snapshotd.errors import Misbehaved, PeerError
from snapshotd.metadata import Accusation

log = logging.getLogger(__name__)


class Conduct:
    """The slot's record of its peers, by node; what it says is told to the whole cluster."""

    def __init__(self) -> None:
        self._trust = Trust()
        #: Called when something is held against a node.
        self.on_change: Callable[[], None] = lambda: None

    def check(self, node: str) -> None:
        """Raises PeerError while a node is cut off."""
        left_s = self._trust.cut_off_s(node, time.monotonic())
        if left_s:
            raise PeerError(f"{node} sent wrong blocks, and is cut off for {left_s:.0f} s more")

    def trusts(self, node: str) -> bool:
        return not self._trust.cut_off_s(node, time.monotonic())

    def strike(self, node: str, misdeed: str, why: str) -> None:
        """A node sent what no honest node sends."""
        log.warning("a strike against %s: %s", node, why)
        self._trust.strike(node, Misdeed(misdeed), time.monotonic())
        self.on_change()

    def praise(self, node: str) -> None:
        """A node sent a whole block that was right."""
        self._trust.good(node, time.monotonic())

    @contextmanager
    def blaming(self, node: str) -> Iterator[None]:
        """Hold it against a node when what it sends within the context is no honest node's."""
        try:
            yield
        except Misbehaved as error:
            self.strike(node, error.misdeed, str(error))
            raise

    def accusations(self) -> tuple[Accusation, ...]:
        """What is held against whom now."""
        return self._trust.accusations(time.monotonic())

    def next_change_s(self) -> float | None:
        """When `accusations` will say something else without any event."""
        return self._trust.next_change_s(time.monotonic())
