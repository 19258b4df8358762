"""One node's work for a job of thousands: `python -m tests.sim.scale [--nodes N,...]`.

The real Board and Membership of one node, the coordinator, in virtual time; what the other nodes
say is made up, at the times at which they would say it. What is assumed:

- One rank a node, groups of GROUP nodes, one parity row, no faults. Ranks seal within SPREAD_S of
  each other, and others may read their images WRITE_S before; a stripe is stored CODE_S after the
  last seal of its group; a message takes LATENCY_S on the average, now and then five times as long.
- A node tells those of its group that its image may be read and that it has sealed it, and every
  node that it has done its part: its parity is stored. So a node hears as many messages as there
  are other nodes, and two more of each in its group. (What is freed and counted comes with
  heartbeats: one a second of each node.)
- What one costs is measured at some moments spread over the snapshot, in CPU time of this thread;
  the others take their place without conclusions. It is the core's cost alone, that of the next
  orders included: no conversion, no socket.
- The watermark's delay counts from the last seal to the coordinator's conclusion. Network: as if
  work cost no time. Each: each message is concluded from before the next is heard. Batched:
  everything that has come is concluded from at once, as the daemon does.
- Beyond `membership.MAX_PEERS` a daemon meets no further nodes; here that bound is lifted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from snapshotd.core import membership
from snapshotd.core.board import Board, Policy
from snapshotd.core.placement import form_groups
from snapshotd.core.protection import parity_homes
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Home,
    JobFacts,
    NodeFacts,
    ParityHolding,
    SlotFacts,
    TrainerFacts,
    Unsealed,
    Version,
)
from snapshotd.rpc.telling import Tellings

from .clock import Clock, about

GROUP, PARITY = 8, 1
WRITE_S, SPREAD_S, CODE_S, LATENCY_S = 0.2, 0.05, 0.2, 0.015
SAMPLES: Final = 16
_JOB, _EPOCH, _BYTES, _ADDRESS = "job", 1, 1 << 20, "127.0.0.1:7070"
#: Nobody is silent for as long as a snapshot takes.
_DEAD_S = 100.0


@dataclass(frozen=True)
class Outcome:
    """What one snapshot asks of one node.

    Attributes:
        messages: that it hears.
        hear_ms: CPU time of one, with what is concluded from it; the median of the samples.
        work_s: CPU time of all of them, each concluded from.
        network_s, each_s, batched_s: delay of the watermark, see above.
        message_bytes: of one message, which tells what is other than before.
        whole_bytes: of one that tells all, as to a node that was started anew.
    """

    nodes: int
    messages: int
    hear_ms: float
    work_s: float
    network_s: float
    each_s: float
    batched_s: float
    message_bytes: int
    whole_bytes: int


class Job:
    """A job that trains, one rank a node, and what each node says of it."""

    def __init__(self, nodes: int) -> None:
        self.homes = {shard: Home(f"n{shard:05d}", 0) for shard in range(nodes)}
        self.groups = form_groups(self.homes, GROUP, PARITY)
        self._group = {shard: group for group in self.groups for shard in group.shards}
        incarnations = tuple(f"{shard:032x}" for shard in range(nodes))
        first = DecisionId(_EPOCH, self.homes[0].node)
        self.decision = Decision(first, _JOB, nodes, self.groups, incarnations)
        committed = Version(_EPOCH, 0)
        self._facts = JobFacts(_JOB, nodes, _EPOCH, _EPOCH, committed, _EPOCH, self.decision)
        self._members = tuple((home.node, _ADDRESS) for home in self.homes.values())

    def slot(self, shard: int, written: int, sealed: int, stored: int) -> SlotFacts:
        """Of a node that has written, sealed and stored the last two steps up to these."""
        trainer = TrainerFacts(
            job=_JOB,
            run_id="run",
            restart_count=0,
            incarnation=self.decision.incarnations[shard],
            shard=shard,
            world=len(self.homes),
            decision=self.decision.id,
            staged=True,
            passed_step=sealed + 1,
        )
        data = tuple(_data(shard, step) for step in _last_two(sealed))
        group, home = self._group[shard], self.homes[shard]
        parity = tuple(
            ParityHolding(
                _JOB,
                Version(_EPOCH, step),
                place,
                _BYTES,
                tuple(_data(s, step).content_digest for s in group.shards),
                (_BYTES,) * group.size,
            )
            for step in _last_two(stored)
            for place, keeper in parity_homes(group)
            if keeper == home
        )
        image = Unsealed(_JOB, shard, Version(_EPOCH, written), _BYTES)
        unsealed = image if written > sealed else None
        return SlotFacts(0, _ADDRESS, trainer, data, parity, unsealed=unsealed)

    def node(self, shard: int, written: int, sealed: int, stored: int) -> NodeFacts:
        slots = (self.slot(shard, written, sealed, stored),)
        sequence = 1 + written + sealed + stored
        name, jobs = self.homes[shard].node, (self._facts,)
        return NodeFacts(
            "sim", name, "1", sequence, _ADDRESS, members=self._members, slots=slots, jobs=jobs
        )

    def times(self, chance: random.Random) -> tuple[dict[int, float], dict[int, float]]:
        """When each node has sealed step 1, and when it has stored its parity of it."""
        sealed = {shard: WRITE_S + SPREAD_S * chance.random() for shard in self.homes}
        stored = {
            shard: max(sealed[s] for s in group.shards) + CODE_S
            for group in self.groups
            for shard in group.shards
        }
        return sealed, stored


def _last_two(newest: int) -> range:
    return range(max(0, newest - 1), newest + 1)


def _data(shard: int, step: int) -> DataHolding:
    digest = (step << 64 | shard).to_bytes(16, "big")
    return DataHolding(_JOB, shard, Version(_EPOCH, step), _BYTES, digest)


def coordinator(job: Job) -> Board:
    """The board of the first node, which knows step 0 to be committed."""
    me = job.homes[0].node
    who = membership.Membership(
        cluster_id="sim",
        node=me,
        boot="1",
        address=me,
        seeds={},
        suspect_s=_DEAD_S,
        dead_s=_DEAD_S,
        started_s=0.0,
    )
    policy = Policy(GROUP, PARITY, patience_s=60.0, max_interval=4, replace_s=60.0)
    board = Board(who, policy)
    for shard in list(job.homes)[1:]:
        refusal = who.hear(job.node(shard, 0, 0, 0), 0.0)
        assert refusal is None, refusal
    board.slot_changed(job.slot(0, 0, 0, 0), 0.0)
    assert _committed(board) == 0
    return board


def _committed(board: Board) -> int:
    (facts,) = board.jobs()
    return facts.committed.step if facts.committed else -1


def measure(nodes: int, samples: int = SAMPLES, seed: int = 0) -> Outcome:
    """One snapshot of a job of so many nodes, as its coordinator sees it."""
    membership.MAX_PEERS = max(membership.MAX_PEERS, nodes)  # type: ignore[misc]
    chance, clock, job = random.Random(seed), Clock(), Job(nodes)
    board = coordinator(job)
    sealed_s, stored_s = job.times(chance)
    arrivals: list[float] = []
    costs: list[float] = []
    mine = set(job.groups[0].shards)
    assert 0 in mine
    count = nodes - 1 + 2 * (len(mine) - 1)
    looked_at = {count * (2 * i + 1) // (2 * samples) for i in range(samples)}

    def arrive(facts: NodeFacts) -> None:
        now_s = clock.now_s
        if len(arrivals) in looked_at:
            begun_s = time.thread_time()
            assert board.hear(facts, now_s) is None
            board.conclude(now_s)
            board.orders(now_s)
            costs.append(time.thread_time() - begun_s)
        else:
            assert board.membership.hear(facts, now_s) is None
        arrivals.append(clock.now_s)

    def say(shard: int, sealed: int, stored: int) -> None:
        facts = job.node(shard, 1, sealed, stored)
        clock.after(about(chance, LATENCY_S), lambda: arrive(facts))

    def of_my_own(sealed: int, stored: int) -> None:
        board.slot_changed(job.slot(0, 1, sealed, stored), clock.now_s)

    for shard in job.homes:
        tell = partial(say, shard) if shard else of_my_own
        if shard in mine:
            clock.after(sealed_s[shard] - WRITE_S, partial(tell, 0, 0))
            clock.after(sealed_s[shard], partial(tell, 1, 0))
        clock.after(stored_s[shard], partial(tell, 1, 1))
    clock.run_until(60.0)
    assert len(arrivals) == count
    board.conclude(clock.now_s)
    assert _committed(board) == 1, "not committed after all that there is to know"
    cost_s = statistics.median(costs)
    last_seal_s = max(sealed_s.values())
    whole, other = _told(job.node(1, 1, 1, 0), job.node(1, 1, 1, 1))
    return Outcome(
        nodes=nodes,
        messages=count,
        hear_ms=1000 * cost_s,
        work_s=cost_s * count,
        network_s=arrivals[-1] - last_seal_s,
        each_s=_each(arrivals, cost_s) - last_seal_s,
        batched_s=_batched(arrivals, cost_s) - last_seal_s,
        message_bytes=other,
        whole_bytes=whole,
    )


def _told(before: NodeFacts, after: NodeFacts) -> tuple[int, int]:
    """Bytes of the message that tells all of `before`, and of that which then tells `after`."""
    speaker, hearer = Tellings(), Tellings()
    whole = speaker.message("hearer", before)
    heard = hearer.take(whole)
    assert heard is not None
    speaker.take(hearer.message(before.node, replace(before, node="hearer")))
    return whole.ByteSize(), speaker.message("hearer", after).ByteSize()


def _each(arrivals: Sequence[float], cost_s: float) -> float:
    """When the last of them is concluded from, one after the other."""
    free_s = 0.0
    for at_s in arrivals:
        free_s = max(free_s, at_s) + cost_s
    return free_s


def _batched(arrivals: Sequence[float], cost_s: float) -> float:
    """When the last of them is concluded from, all that have come together."""
    free_s, begun_s = 0.0, -1.0
    for at_s in arrivals:
        if at_s <= begun_s:
            continue  # it was there when the last conclusions began
        begun_s = max(free_s, at_s)
        free_s = begun_s + cost_s
    return free_s


def main(argv: Iterable[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.scale")
    parser.add_argument("--nodes", default="64,1024,8192", help="numbers of nodes")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(list(argv))
    outcomes = []
    for nodes in map(int, args.nodes.split(",")):
        outcomes.append(asdict(measure(nodes, args.samples)))
        print(json.dumps(outcomes[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
