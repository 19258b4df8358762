"""Nodes come to beat at one time, never more rarely than they must, nor faster than they may."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.core.rhythm import Rhythm, visits

LATENCY_S = 0.003


def beats(count: int, seed: int, until_s: float, stranger_s: float = 0.0) -> list[list[float]]:
    """When each of some nodes beats, their clocks unlike; a stranger may beat as he likes."""
    chance = random.Random(seed)
    rates = [chance.uniform(0.999, 1.001) for _ in range(count)]
    nodes = [Rhythm(1.0) for _ in range(count)]
    found: list[list[float]] = [[] for _ in range(count)]
    events: list[tuple[float, int, bool]] = []
    for node in range(count):
        heapq.heappush(events, (chance.random(), node, False))
    moment_s = stranger_s
    while stranger_s and moment_s < until_s:
        events += [(moment_s, node, True) for node in range(count)]
        moment_s += stranger_s
    heapq.heapify(events)
    while events and events[0][0] < until_s:
        now_s, node, heard = heapq.heappop(events)
        own_s, rhythm = now_s * rates[node], nodes[node]
        if not (rhythm.joins(own_s) if heard else own_s >= rhythm.due_s - 1e-9):
            continue
        rhythm.beat(own_s)
        found[node].append(now_s)
        heapq.heappush(events, (rhythm.due_s / rates[node], node, False))
        for other in set(range(count)) - {node}:
            late_s = LATENCY_S * chance.random()
            heapq.heappush(events, (now_s + late_s, other, True))
    return found


@given(st.integers(2, 12), st.integers(0, 2**32))
def test_all_beat_at_one_time(count: int, seed: int) -> None:
    last = [of_node[-1] for of_node in beats(count, seed, 20.5)]
    assert max(last) - min(last) <= 2 * LATENCY_S or max(last) - min(last) >= 0.98
    for of_node in beats(count, seed, 20.5):
        pauses = [b - a for a, b in itertools.pairwise(of_node[8:])]
        assert all(0.99 < pause < 1.01 for pause in pauses)


@given(st.integers(1, 6), st.integers(0, 2**32), st.floats(0.01, 3.0))
def test_no_pause_is_longer_than_a_heartbeat_nor_shorter_than_half(
    count: int, seed: int, stranger_s: float
) -> None:
    for of_node in beats(count, seed, 10.0, stranger_s):
        assert of_node[-1] > 8.9
        for earlier_s, later_s in itertools.pairwise(of_node):
            assert 0.499 < later_s - earlier_s < 1.002


def test_who_hears_of_nobody_keeps_his_own_time() -> None:
    (alone,) = beats(1, 0, 10.0)
    assert len(alone) == 10


@pytest.mark.parametrize("count", [2, 3, 4, 8, 9, 16])
def test_of_two_one_goes_and_the_work_is_divided(count: int) -> None:
    names = {f"n{i}" for i in range(count)}
    went = {n: visits(n, names - {n}) for n in names}
    for one in names:
        for other in names - {one}:
            assert (other in went[one]) != (one in went[other])
    fewest, most = min(map(len, went.values())), max(map(len, went.values()))
    assert most - fewest <= 1 + count % 2
