"""The network between the nodes: every packet passes through here, and may not arrive.

Each host has a network namespace with one interface; this program is the switch at the other end.
A trouble says what happens on the way from one host to another, so it can be one-way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass

from tests.integration.soak import sandbox

MTU = 9000
SUBNET = "10.77.0"
OUTSIDE = 254  # where status is asked from; nothing ever happens to that way
_BACKLOG_S = 1.0  # what a narrow link queues before it drops
_BATCH = 64


@dataclass(frozen=True)
class Trouble:
    """What happens to packets of one direction.

    Attributes:
        cut: none arrives.
        loss, doubled: the part that is lost, or arrives twice.
        latency_s, jitter_s: jitter puts packets out of order.
        bytes_per_s: 0 is without bound.
    """

    cut: bool = False
    loss: float = 0.0
    doubled: float = 0.0
    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0


Way = tuple[int, int]  # from host, to host


@dataclass
class Host:
    """One place where a node may live."""

    number: int
    namespace: int
    tun: int

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.number}"


class Network:
    """Hosts, and the troubles between them."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self._loop = asyncio.get_running_loop()
        self._rng = rng
        self._troubles: dict[Way, list[Trouble]] = {}
        self._free_at_s: dict[Way, float] = {}
        self.dropped = 0
        self.passed = 0
        self.hosts = [self._host(number) for number in range(1, count + 1)]
        outside = sandbox.interface(f"{SUBNET}.{OUTSIDE}", MTU)
        self._tuns = {**{h.number: h.tun for h in self.hosts}, OUTSIDE: outside}
        for number, tun in self._tuns.items():
            self._loop.add_reader(tun, self._receive, number, tun)

    def _host(self, number: int) -> Host:
        return Host(number, *sandbox.make_network(f"{SUBNET}.{number}", MTU))

    def trouble(self, ways: Iterable[Way], what: Trouble) -> None:
        for way in ways:
            self._troubles.setdefault(way, []).append(what)

    def heal(self, ways: Iterable[Way], what: Trouble) -> None:
        """One trouble less; others of the same ways go on."""
        for way in ways:
            found = self._troubles[way]
            found.remove(what)
            if not found:
                del self._troubles[way]
                self._free_at_s.pop(way, None)

    def close(self) -> None:
        for tun in self._tuns.values():
            self._loop.remove_reader(tun)
            os.close(tun)
        for host in self.hosts:
            os.close(host.namespace)

    # -- packets

    def _receive(self, source: int, tun: int) -> None:
        for _ in range(_BATCH):
            try:
                packet = os.read(tun, 65536)
            except BlockingIOError:
                return
            if packet[0] >> 4 != 4:
                continue
            target = packet[19]
            troubles = self._troubles.get((source, target))
            if troubles is None:
                self._deliver(target, packet)
            else:
                self._through(troubles, (source, target), packet)

    def _through(self, troubles: list[Trouble], way: Way, packet: bytes) -> None:
        if any(t.cut or self._rng.random() < t.loss for t in troubles):
            self.dropped += 1
            return
        now_s = self._loop.time()
        at_s = now_s + sum(t.latency_s + t.jitter_s * self._rng.random() for t in troubles)
        rates = [t.bytes_per_s for t in troubles if t.bytes_per_s]
        if rates:
            sent_s = max(now_s, self._free_at_s.get(way, 0.0)) + len(packet) / min(rates)
            if sent_s - now_s > _BACKLOG_S:
                self.dropped += 1
                return
            self._free_at_s[way] = sent_s
            at_s += sent_s - now_s
        for _ in range(1 + any(self._rng.random() < t.doubled for t in troubles)):
            self._loop.call_at(at_s, self._deliver, way[1], packet)

    def _deliver(self, target: int, packet: bytes) -> None:
        tun = self._tuns.get(target)
        if tun is None:
            return
        self.passed += 1
        with contextlib.suppress(OSError):  # a full queue, or the end of the run
            os.write(tun, packet)
