"""Strikes: who is cut off, for how long, and how trust comes back."""

from __future__ import annotations

import pytest

from snapshotd.core.trust import (
    FIRST_PAUSE_S,
    LAST_PAUSE_S,
    MAX_ACCUSED,
    MAX_STRIKES,
    WINDOW_S,
    Misdeed,
    Trust,
)

BAD = Misdeed.WRONG_BYTES


def struck(times: int, now_s: float = 0.0) -> Trust:
    trust = Trust()
    for _ in range(times):
        trust.strike("n1", BAD, now_s)
    return trust


def test_one_flipped_bit_cuts_nobody_off() -> None:
    trust = struck(1)
    assert trust.cut_off_s("n1", 0.0) == 0.0
    (held,) = trust.accusations(0.0)
    assert (held.node, held.what, held.count, held.cut_off_s) == ("n1", BAD.value, 1, 0.0)
    trust.good("n1", 1.0)
    assert trust.accusations(1.0) == ()


def test_three_strikes_in_a_minute_do() -> None:
    trust = struck(MAX_STRIKES)
    assert trust.cut_off_s("n1", 1.0) == FIRST_PAUSE_S - 1.0
    assert trust.cut_off_s("n2", 1.0) == 0.0
    assert trust.accusations(1.0)[0].cut_off_s == FIRST_PAUSE_S
    assert trust.next_change_s(1.0) == FIRST_PAUSE_S
    assert trust.accusations(FIRST_PAUSE_S)[0].cut_off_s == 0.0


def test_strikes_far_apart_do_not() -> None:
    trust = Trust()
    for i in range(9):
        trust.strike("n1", BAD, i * WINDOW_S / 2)
        assert trust.cut_off_s("n1", i * WINDOW_S / 2) == 0.0


def test_two_bad_for_each_good_one_is_cut_off() -> None:
    trust, now_s = Trust(), 0.0
    while not trust.cut_off_s("n1", now_s):
        trust.strike("n1", BAD, now_s)
        trust.strike("n1", BAD, now_s)
        trust.good("n1", now_s)
        now_s += 1.0
        assert now_s < 10


def test_the_pause_grows_on_probation_and_ends_somewhere() -> None:
    trust, now_s, pauses = struck(MAX_STRIKES), 0.0, []
    for _ in range(8):
        pauses.append(trust.cut_off_s("n1", now_s))
        now_s += pauses[-1]
        trust.strike("n1", BAD, now_s)
    assert pauses == [min(LAST_PAUSE_S, FIRST_PAUSE_S * 2**i) for i in range(8)]


def test_strikes_while_cut_off_do_not_lengthen_the_pause() -> None:
    trust = struck(MAX_STRIKES + 5)
    assert trust.cut_off_s("n1", 0.0) == FIRST_PAUSE_S
    trust.good("n1", 1.0)
    assert trust.cut_off_s("n1", 1.0) == FIRST_PAUSE_S - 1.0


def test_a_good_block_on_probation_clears_all() -> None:
    trust = struck(MAX_STRIKES)
    trust.good("n1", FIRST_PAUSE_S)
    assert trust.accusations(FIRST_PAUSE_S) == ()
    trust.strike("n1", BAD, FIRST_PAUSE_S)
    assert trust.cut_off_s("n1", FIRST_PAUSE_S) == 0.0


@pytest.mark.parametrize("times", [1, MAX_STRIKES])
def test_all_is_forgotten_in_time(times: int) -> None:
    trust, now_s = struck(times), 0.0
    while (change_s := trust.next_change_s(now_s)) is not None:
        assert change_s > now_s
        now_s = change_s
    assert trust.accusations(now_s) == ()
    assert now_s <= FIRST_PAUSE_S + WINDOW_S


def test_only_so_many_are_remembered() -> None:
    trust = Trust()
    for i in range(3 * MAX_ACCUSED):
        trust.strike(f"n{i}", BAD, float(i) / 100)
    assert len(trust.accusations(2.0)) == MAX_ACCUSED
    assert trust.accusations(2.0)[-1].count == 1
