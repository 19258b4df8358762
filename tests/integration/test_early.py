"""Stripes are coded while trainers still write, and count once all is sealed: never before."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.rpc.serving import PATIENCE
from tests.integration.cluster import TIMEOUTS, Cluster, Node, eventually
from tests.integration.writers import Writer, writers

WORLD = 3
IMAGES = [os.urandom(7_000_000 + 100_000 * rank) for rank in range(WORLD)]


def digest_of(image: bytes) -> bytes:
    return content_digest(grain_digests(memoryview(image)))


@pytest.fixture
def nodes(cluster: Callable[..., Cluster]) -> list[Node]:
    return cluster().start(WORLD)


def begin(ranks: list[Writer], step: int, part: float) -> None:
    """All claim a step, then all write that part of each block, and say so."""
    for writer in ranks:
        writer.claim(step)
    for writer in ranks:
        writer.copy(part)


def end(ranks: list[Writer]) -> None:
    """They write the rest."""
    for writer in ranks:
        writer.copy(1.0)
        writer.say_written()


def sent(ranks: list[Writer]) -> list[int]:
    return [writer.sent_bytes() for writer in ranks]


def committed(node: Node) -> int:
    (job,) = node.status().jobs
    return job.committed.step if job.HasField("committed") else 0


def is_committed(ranks: list[Writer], step: int) -> None:
    eventually(f"step {step} is committed", lambda: {committed(w.node) for w in ranks} == {step})
    digests = [digest_of(w.image) for w in ranks]
    for writer in ranks:
        parity = [p for p in writer.slot().parity if p.version.step == step]
        assert parity
        assert all(list(p.content_digests) == digests for p in parity)


def test_all_is_coded_before_anything_is_sealed_and_counts_when_all_is(
    cluster: Callable[..., Cluster],
) -> None:
    patient = cluster()
    patient.timeouts |= {"rpc_s": 60.0, "restore_s": 120.0}  # nobody gives up, and reads twice
    with writers(patient.start(WORLD), IMAGES) as ranks:
        begin(ranks, 1, 0.3)
        for writer in ranks:
            writer.copy(1.0)
        sizes = [len(w.image) for w in ranks]
        eventually("all blocks are with their coders", lambda: sent(ranks) == sizes)
        for writer in ranks[:-1]:
            writer.say_written()
        for writer in ranks[:-1]:
            eventually("its shard is sealed", lambda w=writer: w.slot().data)
        assert not any(w.slot().parity for w in ranks)
        assert not any(committed(w.node) for w in ranks)
        ranks[-1].say_written()
        is_committed(ranks, 1)
        assert sent(ranks) == sizes  # once


def test_an_image_that_is_given_up_takes_what_was_coded_of_it_along(nodes: list[Node]) -> None:
    with writers(nodes, IMAGES) as ranks:
        begin(ranks, 1, 0.6)
        eventually("something is with all coders", lambda: all(sent(ranks)))
        end(ranks[:-1])
        ranks[-1].give_up()
        for step in (2, 3):
            begin(ranks, step, 1.0)
            end(ranks)
            is_committed(ranks, step)
        for writer in ranks:
            slot = writer.slot()
            assert {p.version.step for p in slot.parity} <= {2, 3}
            assert not slot.accused


def given_up(nodes: list[Node]) -> None:
    """Wait until each coder has had enough of waiting."""
    assert PATIENCE * TIMEOUTS["rpc_s"] < 2

    def all_have() -> bool:
        return all("is not coded yet" in node.log.read_text() for node in nodes)

    eventually("nobody waits any more", all_have)


def test_a_trainer_that_stands_still_in_its_copy_is_held_against_nobody(nodes: list[Node]) -> None:
    with writers(nodes, IMAGES) as ranks:
        begin(ranks, 1, 0.6)
        given_up(nodes)
        before = sent(ranks)
        end(ranks)
        is_committed(ranks, 1)
        assert not any(w.slot().accused for w in ranks)
        # The next ones are sent once, when they are sealed.
        for step in (2, 3):
            begin(ranks, step, 1.0)
            for writer in ranks:
                writer.say_written()
            is_committed(ranks, step)
        once = [b + 3 * len(w.image) for b, w in zip(before, ranks, strict=True)]
        for writer in ranks:
            writer.claim(4)  # what was counted is told with the next news
        eventually("each was sent once", lambda: sent(ranks) == once)


def test_bytes_that_change_after_they_stood_are_never_served(nodes: list[Node]) -> None:
    """A trainer may write where it should not; its step is lost, and nobody is blamed."""
    with writers(nodes, IMAGES) as ranks:
        begin(ranks, 1, 1.0)
        given_up(nodes)
        for writer in ranks:
            writer.flip(1_000_000)
        for writer in ranks:
            writer.say_written()
        eventually("it is found", lambda: any(w.slot().counters.quarantined for w in ranks))
        assert not any(committed(w.node) for w in ranks)
        begin(ranks, 2, 1.0)
        end(ranks)
        is_committed(ranks, 2)
        assert not any(w.slot().accused for w in ranks)


def test_a_node_that_is_lost_in_the_middle(nodes: list[Node]) -> None:
    with writers(nodes, IMAGES) as ranks:
        begin(ranks, 1, 0.6)
        eventually("something is with a coder", lambda: sum(sent(ranks)))
        nodes[-1].lose()
        left = ranks[:-1]
        end(left)
        eventually("they are sealed", lambda: all(w.slot().data for w in left))
        assert not any(committed(w.node) for w in left)
        assert not any(w.slot().parity for w in left)
        assert not any(a.node != "" for w in left for a in w.slot().accused)


def test_a_coder_that_waits_for_its_own_trainer_is_held_against_nobody(
    cluster: Callable[..., Cluster],
) -> None:
    """Who keeps its other rows waits meanwhile, and would take it for stalled."""
    stern = cluster(parity=2)
    stern.timeouts |= {"rpc_s": 2.0}
    nodes = stern.start(4)
    images = [os.urandom(1_000_000 + 100_000 * rank) for rank in range(4)]
    with writers(nodes, images) as ranks:
        begin(ranks, 1, 1.0)
        for writer in ranks[:-1]:
            writer.say_written()
        given_up(nodes)
        ranks[-1].say_written()
        is_committed(ranks, 1)
        assert not any(w.slot().accused for w in ranks)
