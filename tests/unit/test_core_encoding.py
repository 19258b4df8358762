"""Which stripes are coded when: of what is sealed, and of what trainers still write."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapshotd.core.encoding import blocks_of, stripes_to_code
from snapshotd.core.instructions import Encode
from snapshotd.core.protection import Slots, coded_from, lacking, parity_homes, unsealed_at
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    ParityHolding,
    ParityPlace,
    SlotFacts,
    TrainerFacts,
    Unsealed,
    Version,
)

JOB, V = "job", Version(1, 4)
HOMES = tuple(Home(name, 0) for name in "abc")
A, B, C = HOMES
SIZES = (100, 200, 300)
GROUP = Group(tuple(Member(i, h) for i, h in enumerate(HOMES)), 1)
DECISION = Decision(DecisionId(1, "a"), JOB, 3, (GROUP,), ("x", "y", "z"))
TRAINS = JobFacts(JOB, 3, 1, 1, Version(1, 3), 1, DECISION)
CODED = Encode(JOB, 1, V, GROUP, 0, (0,), SIZES)


def sealed(shard: int) -> SlotFacts:
    held = DataHolding(JOB, shard, V, SIZES[shard], b"%d" % shard, 3)
    return SlotFacts(0, "up", trainer(shard, V.step + 1), (held,))


def unsealed(shard: int) -> SlotFacts:
    image = Unsealed(JOB, shard, V, SIZES[shard])
    return SlotFacts(0, "up", trainer(shard, V.step), unsealed=image)


def trainer(shard: int, passed: int) -> TrainerFacts:
    return TrainerFacts(
        JOB, "run", 0, "xyz"[shard], shard, 3, decision=DECISION.id, staged=True, passed_step=passed
    )


def of(*slots: SlotFacts) -> dict[Home, SlotFacts]:
    return dict(zip(HOMES, slots, strict=False))


def to_code(slots: Slots, job: JobFacts = TRAINS, home: Home = A) -> list[Encode]:
    return stripes_to_code(job, job.keeping, home, [V], slots)


def parity(slots: Slots, digests: tuple[bytes, ...]) -> dict[Home, SlotFacts]:
    """The same slots, each with its row coded from shards of these digests."""
    rows = {
        home: ParityHolding(JOB, V, place, 150, digests, SIZES)
        for place, home in parity_homes(GROUP)
    }
    return {home: replace(facts, parity=(rows[home],)) for home, facts in slots.items()}


@pytest.mark.parametrize(
    ("slots", "early"),
    [
        (of(sealed(0), sealed(1), sealed(2)), False),
        (of(unsealed(0), unsealed(1), unsealed(2)), True),
        (of(sealed(0), unsealed(1), sealed(2)), True),
        (of(unsealed(0), sealed(1), sealed(2)), True),
    ],
    ids=["sealed", "unsealed", "one unsealed", "the coder's own unsealed"],
)
def test_a_stripe_is_coded_once_every_member_can_be_read(slots: Slots, early: bool) -> None:
    for stripe, home in enumerate(HOMES):
        assert to_code(slots, home=home) == [replace(CODED, stripe=stripe, early=early)]


IMAGE = Unsealed(JOB, 1, V, 200)


@pytest.mark.parametrize(
    "other",
    [
        None,
        replace(IMAGE, version=Version(1, 5)),
        replace(IMAGE, version=Version(2, 4)),
        replace(IMAGE, shard=2),
        replace(IMAGE, job="other"),
    ],
    ids=["nothing", "another step", "another epoch", "another shard", "another job"],
)
def test_what_cannot_be_read_of_a_member_keeps_the_stripe_from_being_coded(
    other: Unsealed | None,
) -> None:
    writes = replace(unsealed(1), unsealed=other)
    assert unsealed_at({B: writes}, B, JOB, 1, V) is None
    assert to_code(of(unsealed(0), writes, unsealed(2))) == []
    assert to_code(of(sealed(0), writes, sealed(2))) == []


def test_what_is_still_written_is_found_where_it_is() -> None:
    assert unsealed_at(of(unsealed(0), unsealed(1)), B, JOB, 1, V) == IMAGE
    assert unsealed_at(of(unsealed(0)), B, JOB, 1, V) is None, "its slot is not live"
    assert unsealed_at(of(sealed(0), sealed(1)), B, JOB, 1, V) is None, "it is whole by now"


def test_a_member_that_is_gone_or_starts_is_waited_for() -> None:
    assert to_code(of(unsealed(0), unsealed(1))) == []
    starts = replace(unsealed(2), address="")
    assert to_code(of(unsealed(0), unsealed(1), starts)) == []


def test_what_a_member_passed_is_not_coded() -> None:
    passed = SlotFacts(0, "up", trainer(1, V.step + 1))
    assert to_code(of(unsealed(0), passed, unsealed(2))) == []


def test_nothing_is_coded_early_of_an_epoch_that_is_over_nor_while_one_is_decided() -> None:
    slots = of(unsealed(0), unsealed(1), unsealed(2))
    later = replace(DECISION, id=DecisionId(2, "a"))
    assert to_code(slots, replace(TRAINS, epoch=2, lineage=2, decision=later)) == []
    assert to_code(slots, replace(TRAINS, epoch=2, pending=later)) == []


def test_what_is_still_written_protects_nothing() -> None:
    digests = (b"0", b"1", b"2")
    whole = parity(of(sealed(0), sealed(1), sealed(2)), digests)
    assert lacking(GROUP, JOB, V, whole) == []
    written = {**whole, B: replace(whole[B], data=(), unsealed=IMAGE)}
    assert lacking(GROUP, JOB, V, written) == [(B, "has not sealed shard 1")]


def test_what_was_coded_of_the_sealed_bytes_is_not_coded_again() -> None:
    digests = (b"0", b"1", b"2")
    assert to_code(parity(of(sealed(0), sealed(1), sealed(2)), digests)) == []
    late = parity(of(sealed(0), unsealed(1), sealed(2)), digests)
    assert to_code(late) == [], "that it is sealed by now is on its way here"
    other = parity(of(sealed(0), sealed(1), sealed(2)), (b"0", b"1", b"x"))
    assert to_code(other) == [CODED]


def test_a_block_counts_as_coded_from_what_is_sealed_as_far_as_that_is_known() -> None:
    block = ParityHolding(JOB, V, ParityPlace((0, 1), 1, 0, 0), 100, (b"a", b"b"), (100, 100))
    assert not coded_from(None, (b"", b""))
    assert coded_from(block, (b"a", b"b"))
    assert coded_from(block, (b"", b"b"))
    assert coded_from(block, (b"", b""))
    assert not coded_from(block, (b"a", b"x"))
    assert not coded_from(block, (b"", b"x"))
    assert not coded_from(replace(block, content_digests=(b"", b"b")), (b"a", b"b"))


def test_a_shard_is_cut_as_the_group_that_codes_it_cuts_it() -> None:
    four = Group(tuple(Member(i, Home(f"n{i}", 0)) for i in range(4)), 2)
    plain = Group((Member(4, Home("n4", 0)), Member(5, Home("n5", 0))), 0)
    saving = replace(four, unkept=1)
    given_up = replace(four, unkept=2)
    assert blocks_of((plain, four), Home("n3", 0)) == 2
    assert blocks_of((GROUP,), A) == 2
    assert blocks_of((saving,), Home("n3", 0)) == 2, "fewer rows, of the same code"
    assert blocks_of((plain, four), Home("n4", 0)) == 1, "it has no parity"
    assert blocks_of((given_up,), Home("n3", 0)) == 1, "it gave all parity up"
    assert blocks_of((plain, four), Home("n9", 0)) == 1, "it is in no group"
    assert blocks_of((), A) == 1
