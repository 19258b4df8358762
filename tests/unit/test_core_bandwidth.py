"""The token bucket, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.core.bandwidth import BURST_S, Bucket, most_streams

RATE = 1000


def test_without_a_bound_nobody_waits() -> None:
    bucket = Bucket(0)
    assert [bucket.take(1 << 40, now_s) for now_s in (0.0, 0.0, 1.0)] == [0.0] * 3


def test_who_comes_later_waits_for_all_before() -> None:
    bucket = Bucket(RATE)
    waits = [bucket.take(500, 10.0) for _ in range(4)]
    assert waits == pytest.approx([0.0, *(n * 0.5 - BURST_S for n in (1, 2, 3))])


def test_a_pause_is_made_up_for_by_no_more_than_a_burst() -> None:
    bucket = Bucket(RATE)
    bucket.take(100, 0.0)
    waits = [bucket.take(10, 1000.0) for _ in range(7)]
    assert [w > 0 for w in waits] == [False] * 6 + [True]


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 400)), max_size=40))
def test_at_no_time_has_more_gone_than_the_bound_allows(asked: list[tuple[float, int]]) -> None:
    bucket, now_s, gone = Bucket(RATE), 1.0, []
    for pause_s, count in asked:
        now_s += pause_s
        gone.append((now_s + bucket.take(count, now_s), count))
    for i, (first_s, _) in enumerate(gone):
        total = 0
        for at_s, count in gone[i:]:
            assert total - gone[i][1] <= RATE * (at_s - first_s + BURST_S) + 1e-6
            total += count


@given(st.integers(1, 1 << 40), st.floats(0.1, 100), st.integers(1, 1 << 20))
def test_so_many_streams_that_each_has_its_turn_in_a_third_of_the_time(
    rate: int, stall_s: float, chunk: int
) -> None:
    count = most_streams(rate, stall_s, chunk)
    assert count is not None
    assert count == 1 or count * chunk / rate <= stall_s / 3 * (1 + 1e-9)
    assert (count + 1) * chunk / rate >= stall_s / 3 * (1 - 1e-9)


def test_where_nothing_waits_there_may_be_any_number_of_streams() -> None:
    assert most_streams(0, 10.0, 1 << 20) is None
