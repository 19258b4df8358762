"""Coding while trainers still write: from the first byte written to the commit, with and without.

Four real daemons on loopback, one rank each. Ranks write at a bounded rate, as a device that copies
into the host's memory does, and leave the processors alone in between. What a rank says while it
writes (`Copied`) is all that differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import count
from threading import Event

from snapshotd.config import Timeouts
from tests.bench.harness import MIB, Scale, Table, Timing, timed
from tests.integration.cluster import Cluster
from tests.integration.writers import Writer, writers

NODES = 4
#: Bytes a second of each rank; 0: as fast as it goes.
RATES = (0, 2_000_000_000, 1_000_000_000, 500_000_000)
#: Of the image, between two words to the daemon.
PART = 1 / 16


def run(scale: Scale) -> Iterator[Table]:
    table = Table(
        f"Coding while ranks write: {NODES} nodes, {scale.bytes // MIB} MiB each, m = 1",
        "ms, medians, from the first byte of a snapshot to its commit; GB/s: of each rank's copy, "
        "0: unbounded; copy: its time; later: stripes are coded once all is sealed; early: while "
        "ranks write; saved: of what follows the copy where it is coded later",
    )
    budget = round(2.2 * scale.bytes * (1 + 1 / (NODES - 1))) + 64 * MIB
    cluster = Cluster(parity=1, memory_budget=budget)
    cluster.timeouts = {name: getattr(Timeouts(), name) for name in cluster.timeouts}
    with (
        closing(cluster),
        writers(cluster.start(NODES), [bytes(scale.bytes)] * NODES) as ranks,
        ThreadPoolExecutor(NODES) as pool,
    ):
        steps, copies = count(1), Timing()

        def snapshot(rate: int, early: bool) -> None:
            step = next(steps)
            list(pool.map(lambda rank: rank.claim(step), ranks))
            copies.note(lambda: list(pool.map(lambda rank: _copy(rank, rate, early), ranks)))
            list(pool.map(Writer.until_committed, ranks))

        for rate in RATES:
            copies = Timing()
            works = {early: partial(snapshot, rate, early) for early in (False, True)}
            times = timed(works, scale.repeats)
            copy_s = copies.median_s
            later, early = times[False].median_s, times[True].median_s
            table.add(
                **{"GB/s": rate / 1e9},
                copy=1e3 * copy_s,
                later=1e3 * later,
                early=1e3 * early,
                saved=(later - early) / (later - copy_s),
            )
    yield table


def _copy(rank: Writer, rate: int, early: bool) -> None:
    begun_s, part = time.monotonic(), 0.0
    while part < 1:
        part = min(1.0, part + PART)
        rank.write(part)
        if early:
            rank.tell()
        if rate:
            due_s = begun_s + part * len(rank.image) / rate
            Event().wait(max(0.0, due_s - time.monotonic()))
    rank.say_written()
