"""What may happen to the job, and when it is allowed to.

An act strikes, perhaps lasts for a while, and takes back what it did. Acts overlap. Memory is only
lost while every step that was committed is protected, and never more than the parity bears, but for
`lose_too_many`, which runs alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from tests.integration.soak.launcher import Launcher
from tests.integration.soak.ledger import Ledger
from tests.integration.soak.network import Network, Trouble, Way
from tests.integration.soak.node import Node
from tests.integration.soak.nodes import Nodes

_REPLACED_WITHIN_S = 40.0


@dataclass
class Stage:
    """All that acts act upon."""

    nodes: Nodes
    launcher: Launcher
    network: Network
    ledger: Ledger
    parity: int
    lost_at: int = -1  # steps begun when memory was lost last
    lost: int = 0  # memories since a step begun after that was committed
    keeper: str = ""  # this node's daemon is never killed, so that it can be watched
    moving: set[str] = field(default_factory=set)  # nodes that are being lost or replaced

    def losable(self) -> int:
        """How many memories may be lost now."""
        if self.launcher.safe_since(self.lost_at):
            self.lost = 0
        elif self.lost_at < 0 or self.lost == 0:
            return 0
        return self.parity - self.lost

    def lose(self, count: int = 1) -> None:
        self.lost += count
        self.lost_at = self.launcher.begun

    def mortal(self) -> list[Node]:
        """Nodes whose daemon may be killed."""
        homes = self.launcher.homes
        return [n for n in homes if n.name != self.keeper and n.name not in self.moving]


Act = Callable[[Stage, random.Random], Awaitable[bool]]


def _length_s(rng: random.Random) -> float:
    """Shorter and longer than it takes to be suspected (2.5 s), and to be given up (5 s)."""
    return rng.choice([rng.uniform(0.2, 2.0), rng.uniform(2.0, 6.0), rng.uniform(5.0, 12.0)])


# -- deaths


async def kill_trainer(stage: Stage, rng: random.Random) -> bool:
    node = rng.choice(stage.launcher.homes)
    stage.ledger.fault("kill trainer", node.name)
    await stage.launcher.kill_trainer(node)
    return True


async def move_ranks(stage: Stage, rng: random.Random) -> bool:
    """All trainers die, and come back on other nodes."""
    if stage.moving:
        return False
    homes = stage.launcher.homes
    order = homes[:]
    rng.shuffle(order)
    stage.ledger.fault("move ranks", " ".join(n.name for n in order))
    async with stage.launcher.held():
        first, homes[:] = homes[0], order
        await stage.launcher.kill_trainer(first)
    return True


async def kill_smp(stage: Stage, rng: random.Random) -> bool:
    if not (mortal := stage.mortal()):
        return False
    node = rng.choice(mortal)
    stage.ledger.fault("kill SMP", node.name)
    node.kill_smps()
    return True


async def kill_supervisor(stage: Stage, rng: random.Random) -> bool:
    if not (mortal := stage.mortal()):
        return False
    node = rng.choice(mortal)
    stage.ledger.fault("kill supervisor", node.name)
    node.kill_supervisor()
    return True


async def kill_daemon(stage: Stage, rng: random.Random) -> bool:
    """Supervisor and SMPs, on one node or on several; segments stay."""
    if not (mortal := stage.mortal()):
        return False
    nodes = rng.sample(mortal, rng.choice([1, 1, 1, min(2, len(mortal)), len(mortal)]))
    down_s = rng.uniform(0.0, 8.0)
    names = " ".join(n.name for n in nodes)
    stage.ledger.fault("kill daemon", f"{names}, back after {down_s:.1f} s")
    with_trainers = rng.random() < 0.3
    with _moved(stage, nodes):
        for node in nodes:
            node.kill()
            if with_trainers:
                await stage.launcher.kill_trainer(node)
        await asyncio.sleep(down_s)
        for node in nodes:
            node.start()
    return True


# -- losses


async def lose_node(stage: Stage, rng: random.Random) -> bool:
    """A node goes with its memory; an empty one takes its place."""
    mortal = stage.mortal()
    count = rng.randint(1, stage.parity)
    if stage.losable() < count or len(mortal) < count:
        return False
    victims = rng.sample(mortal, count)
    away_s = rng.uniform(0.3, 5.0)
    renamed = rng.random() < 0.5 and stage.nodes.spare() >= count
    kind = "lose node, new name" if renamed else "lose node, same name"
    names = " ".join(n.name for n in victims)
    stage.ledger.fault(kind, f"{names}, replaced after {away_s:.1f} s")
    stage.ledger.counts["memories lost"] += count
    stage.lose(count)
    with _moved(stage, victims):
        async with stage.launcher.held():
            await _lose(stage, victims)
            replacements = [stage.nodes.add() for _ in victims] if renamed else victims
            for old, new in zip(victims, replacements, strict=True):
                _take_place(stage, old, new)
                if renamed:
                    await stage.nodes.remove(old)
        await asyncio.sleep(away_s)
        for node in replacements:
            node.start()
    return True


async def _lose(stage: Stage, victims: list[Node]) -> None:
    for node in victims:
        node.kill()
    for node in victims:
        await stage.launcher.kill_trainer(node)
        await node.lose()


async def exile(stage: Stage, rng: random.Random) -> bool:
    """A node is cut off and replaced; later it is back, with the memory of an older epoch."""
    mortal = stage.mortal()
    if stage.losable() < 1 or not mortal or not stage.nodes.spare():
        return False
    old = rng.choice(mortal)
    back_s = rng.uniform(2.0, 8.0)
    stage.ledger.fault("exile", f"{old.name}, back for {back_s:.1f} s when it was replaced")
    stage.ledger.counts["memories lost"] += 1
    stage.lose()
    cut, ways = Trouble(cut=True), _ways(stage, old, both=True)
    with _moved(stage, [old]):
        with _troubled(stage, ways, cut):
            async with stage.launcher.held():
                await stage.launcher.kill_trainer(old)
                new = stage.nodes.add()
                ways += [(new.host.number, old.host.number), (old.host.number, new.host.number)]
                stage.network.trouble(ways[-2:], cut)
                _take_place(stage, old, new)
            new.start()
            await stage.launcher.protected_after(stage.lost_at, _REPLACED_WITHIN_S)
        if rng.random() < 0.5:
            await stage.launcher.kill_trainer(rng.choice(stage.launcher.homes))
        await asyncio.sleep(back_s)
        await old.lose()
        await stage.nodes.remove(old)
    return True


def _take_place(stage: Stage, old: Node, new: Node) -> None:
    homes = stage.launcher.homes
    homes[homes.index(old)] = new


async def lose_too_many(stage: Stage, rng: random.Random) -> bool:
    """One memory more than the parity bears: a clear error on all ranks, then a fresh start."""
    mortal = stage.mortal()
    if stage.losable() < stage.parity or len(mortal) <= stage.parity:
        return False
    victims = rng.sample(mortal, stage.parity + 1)
    stage.ledger.fault("lose too many", " ".join(n.name for n in victims))
    stage.ledger.counts["memories lost"] += len(victims)
    stage.ledger.beyond = True
    stage.lose(stage.parity)
    with _moved(stage, victims):
        async with stage.launcher.held():
            await _lose(stage, victims)
        for node in victims:
            node.start()
    return True


# -- halts


async def stop_process(stage: Stage, rng: random.Random) -> bool:
    """SIGSTOP, and SIGCONT later."""
    node = rng.choice(stage.launcher.homes)
    what = rng.choice(["trainer", "SMP", "supervisor", "daemon"])
    trainer = stage.launcher.trainer_of(node)
    pids = {
        "trainer": [trainer.pid] if trainer else [],
        "SMP": node.smp_pids(),
        "supervisor": [node.pid] if node.pid else [],
        "daemon": [*([node.pid] if node.pid else []), *node.smp_pids()],
    }[what]
    if not pids:
        return False
    for_s = _length_s(rng)
    stage.ledger.fault(f"stop {what}", f"{node.name} for {for_s:.1f} s")
    with contextlib.ExitStack() as handles:
        held = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                handles.callback(os.close, handle)
                held.append((pid, handle))
        for pid, handle in held:
            if what == "trainer":
                stage.launcher.stopped(pid)
            _signal(handle, signal.SIGSTOP)
        try:
            await asyncio.sleep(for_s)
        finally:
            for pid, handle in held:
                _signal(handle, signal.SIGCONT)
                stage.launcher.continued(pid)
    return True


def _signal(handle: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, number)


# -- the network


def _ways(stage: Stage, node: Node, *, both: bool, outwards: bool = True) -> list[Way]:
    mine = node.host.number
    others = [n.host.number for n in stage.nodes.all if n is not node]
    ways = [(mine, other) for other in others] if both or outwards else []
    if both or not outwards:
        ways += [(other, mine) for other in others]
    return ways


def _some_ways(stage: Stage, rng: random.Random) -> tuple[str, list[Way]]:
    one, other = rng.sample(stage.launcher.homes, 2)
    pair = (one.host.number, other.host.number)
    return rng.choice(
        [
            (f"all of {one.name}", _ways(stage, one, both=True)),
            (f"out of {one.name}", _ways(stage, one, both=False)),
            (f"into {one.name}", _ways(stage, one, both=False, outwards=False)),
            (f"{one.name} and {other.name}", [pair, pair[::-1]]),
            (f"{one.name} to {other.name}", [pair]),
        ]
    )


async def cut(stage: Stage, rng: random.Random) -> bool:
    """A partition, whole or one-way, of a node or of a pair."""
    where, ways = _some_ways(stage, rng)
    for_s = _length_s(rng)
    one_way = where.startswith(("out", "into")) or " to " in where
    kind = "cut, one way" if one_way else "cut"
    stage.ledger.fault(kind, f"{where} for {for_s:.1f} s")
    with _troubled(stage, ways, Trouble(cut=True)):
        await asyncio.sleep(for_s)
    return True


async def split(stage: Stage, rng: random.Random) -> bool:
    """Two halves that do not see each other."""
    numbers = [n.host.number for n in stage.nodes.all]
    half = set(rng.sample(numbers, len(numbers) // 2))
    for_s = _length_s(rng)
    stage.ledger.fault("split in halves", f"hosts {sorted(half)} for {for_s:.1f} s")
    ways = [(a, b) for a in numbers for b in numbers if (a in half) != (b in half)]
    with _troubled(stage, ways, Trouble(cut=True)):
        await asyncio.sleep(for_s)
    return True


async def bad_line(stage: Stage, rng: random.Random) -> bool:
    """Slow, lossy, narrow or out of order."""
    kind, trouble = rng.choice(
        [
            ("latency", Trouble(latency_s=rng.uniform(0.02, 0.4))),
            ("jitter", Trouble(jitter_s=rng.uniform(0.02, 0.2))),
            ("loss", Trouble(loss=rng.uniform(0.01, 0.3))),
            ("doubling", Trouble(doubled=rng.uniform(0.1, 0.5))),
            ("bandwidth", Trouble(bytes_per_s=rng.uniform(100e3, 2e6))),
        ]
    )
    where, ways = _some_ways(stage, rng)
    for_s = _length_s(rng)
    stage.ledger.fault(f"network: {kind}", f"{where} for {for_s:.1f} s")
    with _troubled(stage, ways, trouble):
        await asyncio.sleep(for_s)
    return True


# -- memory


async def fill(stage: Stage, rng: random.Random) -> bool:
    """The node's tmpfs is full for some seconds; sometimes for a node whose daemon starts again."""
    node = rng.choice(stage.launcher.homes)
    if node.name in stage.moving:
        return False
    for_s = _length_s(rng)
    kill = rng.random() < 0.4 and node in stage.mortal()
    stage.ledger.fault("fill memory", f"{node.name} for {for_s:.1f} s{', daemon killed' * kill}")
    node.fill()
    if kill:
        node.kill()
        node.start()
    try:
        await asyncio.sleep(for_s)
    finally:
        node.unfill()
    return True


@contextlib.contextmanager
def _troubled(stage: Stage, ways: list[Way], what: Trouble) -> Iterator[None]:
    stage.network.trouble(ways, what)
    try:
        yield
    finally:
        stage.network.heal(ways, what)


@contextlib.contextmanager
def _moved(stage: Stage, nodes: list[Node]) -> Iterator[None]:
    """Nobody else kills or replaces these nodes meanwhile."""
    names = {n.name for n in nodes}
    stage.moving |= names
    try:
        yield
    finally:
        stage.moving -= names


#: How likely each is, when it is possible.
ACTS: dict[Act, int] = {
    kill_trainer: 3,
    move_ranks: 1,
    kill_smp: 3,
    kill_supervisor: 3,
    kill_daemon: 3,
    lose_node: 6,
    exile: 1,
    stop_process: 5,
    cut: 4,
    split: 1,
    bad_line: 4,
    fill: 3,
}
