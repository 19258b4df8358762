"""The network: late, lossy, doubling, out of order, and cut in any way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from .clock import Clock, about

FACTS, BLOCKS = "facts", "blocks"
LATENCY_S = 0.015
REORDER_S = 0.3


@dataclass(frozen=True, eq=False)
class Cut:
    """Nothing of these planes comes from one side to the other."""

    senders: frozenset[str]
    receivers: frozenset[str]
    planes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Haze:
    """Messages of a node suffer for a while."""

    kind: str
    node: str
    rate: float


@dataclass(frozen=True, eq=False)
class Slow:
    """Everything a node does is late."""

    node: str


_Trouble = TypeVar("_Trouble", Cut, Haze, Slow)


class Network:
    """Carries messages between nodes, or does not."""

    def __init__(self, clock: Clock, chance: random.Random, seen: Counter[str]) -> None:
        self._clock, self._chance, self._seen = clock, chance, seen
        self._cuts: list[Cut] = []
        self._hazes: list[Haze] = []
        self._slow: list[Slow] = []
        self._history: list[tuple[Cut | Haze | Slow, float]] = []  # and until when
        self._sent = 0
        self._newest: dict[tuple[str, str], int] = {}  # number of the last message that arrived
        self.messages = 0

    # -- faults

    def cut(
        self, senders: Iterable[str], receivers: Iterable[str], planes: tuple[str, ...],
        for_s: float, *, both: bool,
    ) -> None:  # fmt: skip
        there, here = frozenset(senders), frozenset(receivers)
        self._for_a_while(self._cuts, Cut(there, here, planes), for_s)
        if both:
            self._for_a_while(self._cuts, Cut(here, there, planes), for_s)

    def haze(self, kind: str, node: str, rate: float, for_s: float) -> None:
        self._for_a_while(self._hazes, Haze(kind, node, rate), for_s)

    def slow(self, node: str, for_s: float) -> None:
        self._for_a_while(self._slow, Slow(node), for_s)

    def _for_a_while(self, active: list[_Trouble], item: _Trouble, for_s: float) -> None:
        active.append(item)
        self._history.append((item, self._clock.now_s + for_s))

        def end() -> None:
            if item in active:
                active.remove(item)

        self._clock.after(for_s, end)

    def heal(self) -> None:
        now_s = self._clock.now_s
        self._cuts.clear()
        self._hazes.clear()
        self._slow.clear()
        self._history = [(item, min(end_s, now_s)) for item, end_s in self._history]

    def troubled(self, for_node: str, since_s: float) -> set[str]:
        """Nodes of which `for_node` may not have heard all since a moment."""
        found: set[str] = set()
        for item, end_s in self._history:
            if end_s < since_s:
                continue
            if not isinstance(item, Cut):
                found.add(item.node)
            elif for_node in item.senders:
                found |= item.receivers
            elif for_node in item.receivers:
                found |= item.senders
        return found

    # -- what gets through

    def pace(self, node: str) -> float:
        """How much longer everything takes there."""
        return 8.0 if self._slow and any(s.node == node for s in self._slow) else 1.0

    def passes(self, sender: str, receiver: str, plane: str) -> bool:
        if sender == receiver:
            return True
        return not any(
            plane in c.planes and sender in c.senders and receiver in c.receivers
            for c in self._cuts
        )

    def reaches(self, a: str, b: str, plane: str) -> bool:
        """Whether a question and its answer get through."""
        return not self._cuts or (self.passes(a, b, plane) and self.passes(b, a, plane))

    def send(self, sender: str, receiver: str, plane: str, arrive: Callable[[], None]) -> None:
        """`arrive` happens some time later, perhaps twice, perhaps never."""
        self.messages += 1
        self._sent += 1
        delay_s = about(self._chance, LATENCY_S)
        if self._slow:
            delay_s *= max(self.pace(sender), self.pace(receiver))
        if self._hazes:
            for haze in self._hazes:
                if haze.node not in {sender, receiver} or self._chance.random() > haze.rate:
                    continue
                self._seen[haze.kind] += 1
                if haze.kind == "messages dropped":
                    return
                if haze.kind == "messages duplicated":
                    later_s = delay_s + about(self._chance, 0.1)
                    self._deliver(sender, receiver, plane, later_s, arrive)
                elif haze.kind == "messages delayed":
                    delay_s += 0.2
                else:
                    delay_s += REORDER_S * self._chance.random()
        self._deliver(sender, receiver, plane, delay_s, arrive)

    def _deliver(
        self, sender: str, receiver: str, plane: str, delay_s: float, arrive: Callable[[], None]
    ) -> None:
        number = self._sent

        def happen() -> None:
            if self._cuts and not self.passes(sender, receiver, plane):
                self._seen["messages lost to a partition"] += 1
                return
            pair = (sender, receiver)
            if number < self._newest.get(pair, 0):
                self._seen["messages out of order"] += 1
            else:
                self._newest[pair] = number
            arrive()

        self._clock.after(delay_s, happen)
