"""Saved by one number of ranks, taken up by another, straight from the daemons' memory."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from snapshotd.rpc.operator import fetch_plan
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.errors import Refused
from tests.integration.bare import MANIFEST_BYTES, BareJob, Row, fill_of, image_of
from tests.integration.cluster import Cluster, Node, eventually

STEP = 3
#: Over several grains, blocks and chunks, and no multiple of anything.
BASE_BYTES = 5_000_011


def size_of(shard: int) -> int:
    return BASE_BYTES + 100_003 * shard


def whole(world: int, step: int = STEP) -> bytes:
    """All images of a world one behind the other, without their manifests."""
    return b"".join(image_of(s, step, size_of(s))[MANIFEST_BYTES:] for s in range(world))


def rows_of(rank: int, world: int, saved: int) -> tuple[int, list[Row]]:
    """The part of `whole(saved)` that falls to one of `world` ranks: image length, ranges."""
    lengths = [size_of(s) - MANIFEST_BYTES for s in range(saved)]
    start, end = (sum(lengths) * r // world for r in (rank, rank + 1))
    rows, at = [], 0
    for shard, length in enumerate(lengths):
        first, last = max(start, at), min(end, at + length)
        if first < last:
            rows.append((shard, MANIFEST_BYTES + first - at, last - first, first - start))
        at += length
    return end - start, rows


@contextmanager
def job(homes: list[tuple[Node, int]]) -> Iterator[BareJob]:
    made = BareJob(homes)
    try:
        yield made
    finally:
        made.vanish()


def saved_by_four(cluster: Cluster) -> list[Node]:
    nodes = cluster.start(4)
    with job([(node, 0) for node in nodes]) as old:
        old.restore()
        old.save(STEP, size_of)
    return nodes


def homes_of(nodes: list[Node], world: int) -> list[tuple[Node, int]]:
    """2 and 3 ranks on as many nodes; 6 on three nodes, two each."""
    return [(nodes[r // 2], r % 2) for r in range(6)] if world == 6 else [
        (node, 0) for node in nodes[:world]
    ]  # fmt: skip


def check_filled(new: BareJob, world: int, saved: int = 4) -> list[pb.Filled]:
    """Every rank fills its part; together they are what was saved, byte for byte."""

    def one(rank: object) -> tuple[bytes, pb.Filled]:
        length, rows = rows_of(rank.rank, world, saved)  # type: ignore[attr-defined]
        return rank.fill(length, rows)  # type: ignore[attr-defined, no-any-return]

    found = new.each(one)
    assert b"".join(image for image, _ in found) == whole(saved)
    return [filled for _, filled in found]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_another_world_reads_what_it_needs_and_no_more(
    cluster: Callable[..., Cluster], world: int
) -> None:
    nodes = saved_by_four(cluster())
    with job(homes_of(nodes, world)) as new:
        for restored in new.restore(reshard=True):
            assert restored.decision.restore.step == STEP
            assert (restored.decision.saved_world, restored.path) == (4, "")
        found = new.ranks[-1].manifests()
        assert found == {
            s: (image_of(s, STEP, size_of(s))[:MANIFEST_BYTES], size_of(s)) for s in range(4)
        }
        for rank, filled in enumerate(check_filled(new, world)):
            _, rows = rows_of(rank, world, 4)
            assert filled.bytes_decoded == 0
            assert filled.bytes_local + filled.bytes_copied == sum(r[2] for r in rows)
            elsewhere = sum(n for s, _, n, _ in rows if nodes[s] is not new.ranks[rank].node)
            assert filled.bytes_received == elsewhere
        # And from then on it is an ordinary job.
        new.save(STEP + 1, size_of)
    with job(homes_of(nodes, world)) as again:
        assert {r.decision.restore.step for r in again.restore()} == {STEP + 1}


@pytest.mark.parametrize("world", [2, 3])
def test_of_a_lost_shard_only_the_ranges_that_are_needed_are_decoded(
    cluster: Callable[..., Cluster], world: int
) -> None:
    nodes = saved_by_four(cluster())
    nodes[1].lose()
    left = [nodes[0], nodes[2], nodes[3]]
    with job([(node, 0) for node in left[:world]]) as new:
        assert {r.decision.saved_world for r in new.restore(reshard=True)} == {4}
        found = new.ranks[0].manifests(1, 3)
        assert {s: image for s, (image, _) in found.items()} == {
            s: image_of(s, STEP, size_of(s))[:MANIFEST_BYTES] for s in (1, 3)
        }
        told = check_filled(new, world)
        assert sum(f.bytes_decoded for f in told) == size_of(1) - MANIFEST_BYTES
        for rank, filled in enumerate(told):
            _, rows = rows_of(rank, world, 4)
            lost = sum(n for s, _, n, _ in rows if s == 1)
            assert filled.bytes_decoded == lost
            held = sum(n for s, _, n, _ in rows if s != 1 and nodes[s] is not left[rank])
            # Three blocks for each lost one, one of them here: two come, by whole grains.
            assert held + 1.9 * lost <= filled.bytes_received <= held + 2.1 * lost
        # A few bytes in the middle cost a few grains.
        rows = [(1, 2_000_001, 10, 5), (1, 4_000_001, 10, 20)]
        some, filled = new.ranks[0].fill(40, rows)
        image = image_of(1, STEP, size_of(1))
        assert some == bytes(5) + image[2_000_001:2_000_011] + bytes(5) + (
            image[4_000_001:4_000_011] + bytes(10)
        )
        assert filled.bytes_received <= 2 * 3 * 32_768
        new.save(STEP + 1, size_of)


def test_a_daemon_killed_while_others_read_from_it_costs_time_only(
    cluster: Callable[..., Cluster],
) -> None:
    """It stands still with the ranges on their way, is killed, and its shard is decoded."""
    nodes = saved_by_four(cluster())
    with job([(nodes[0], 0), (nodes[1], 0)]) as new:
        new.restore(reshard=True)
        for pid in nodes[3].smp_pids():
            os.kill(pid, signal.SIGSTOP)
        length = size_of(3)
        number = new.ranks[0].post(fill=fill_of(length, [(3, 0, length, 0)]))
        nodes[3].kill()
        image, filled = new.ranks[0].filled(number, length)
        assert image == image_of(3, STEP, length)
        assert filled.bytes_decoded > 0
        nodes[3].start()
        check_filled(new, 2)


def test_a_daemon_killed_while_its_own_trainer_fills_is_asked_again(
    cluster: Callable[..., Cluster],
) -> None:
    nodes = saved_by_four(cluster())
    with job([(nodes[0], 0), (nodes[1], 0)]) as new:
        new.restore(reshard=True)
        length, rows = rows_of(0, 2, 4)
        new.ranks[0].post(fill=fill_of(length, rows))
        (pid,) = nodes[0].smp_pids()
        os.kill(pid, signal.SIGKILL)
        new.ranks[0].connect_again()
        check_filled(new, 2)


def test_a_crash_before_the_first_commit_goes_back_to_the_same_step_into_any_world(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster()
    nodes = saved_by_four(made)
    with job([(nodes[0], 0), (nodes[1], 0)]) as new:
        assert {r.decision.restore.step for r in new.restore(reshard=True)} == {STEP}
        check_filled(new, 2)
        # One of two has saved; that is nothing yet.
        new.ranks[0].save(STEP + 1, size_of(0))
    nodes[2].lose()
    with job([(node, 0) for node in (nodes[3], nodes[1], nodes[0])]) as other:
        restored = other.restore(reshard=True)
        assert {(r.decision.restore.step, r.decision.saved_world) for r in restored} == {(STEP, 4)}
        check_filled(other, 3)
    replacement = made.node("n4")
    replacement.start()
    with job([(node, 0) for node in (nodes[3], nodes[1], nodes[0], replacement)]) as same:
        restored = same.restore()
        assert {(r.decision.restore.step, r.decision.saved_world) for r in restored} == {(STEP, 0)}
        for rank, answer in enumerate(restored):
            assert answer.image_bytes == size_of(rank)


def test_who_cannot_take_another_world_is_told_so(cluster: Callable[..., Cluster]) -> None:
    nodes = saved_by_four(cluster())
    for able in (0, 1):
        with job([(nodes[0], 0), (nodes[1], 0)]) as new:
            for refusal in new.each(lambda r, able=able: r.refusal(reshard=r.rank < able)):
                assert "was saved by 4 ranks and 2 ask" in refusal
                assert not able or "not able to: rank 1" in refusal
    with job([(nodes[0], 0), (nodes[1], 0)]) as new:
        assert {r.decision.saved_world for r in new.restore(reshard=True)} == {4}
        check_filled(new, 2)


def test_more_lost_than_can_be_decoded_is_said_shard_by_shard(
    cluster: Callable[..., Cluster],
) -> None:
    nodes = saved_by_four(cluster())
    for node in nodes[2:]:
        node.lose()
    with job([(nodes[0], 0), (nodes[1], 0)]) as new:
        for refusal in new.each(lambda r: r.refusal(reshard=True)):
            assert "saved by 4 ranks: shard 2 is missing" in refusal
            assert "saved by 4 ranks: shard 3 is missing" in refusal


def test_bad_ranges_are_refused_and_leave_nothing_behind(
    cluster: Callable[..., Cluster],
) -> None:
    nodes = saved_by_four(cluster())
    with job([(nodes[0], 0), (nodes[1], 0)]) as new:
        rank = new.ranks[0]
        with pytest.raises(Refused, match="before restore"):
            rank.fill(10, [(0, 0, 10, 0)])
        new.restore(reshard=True)
        wrong: list[tuple[int, list[Row], str]] = [
            (10, [(4, 0, 10, 0)], "a snapshot that 4 ranks saved"),
            (10, [(0, size_of(0) - 5, 10, 0)], "whose image has"),
            (10, [(0, 0, 0, 0)], "a range of 0 bytes"),
            (10, [(0, 0, 10, 1)], "of an image of 10 bytes"),
            (30, [(0, 0, 10, 0), (1, 0, 10, 9)], "two ranges go to byte 9"),
            (1 << 50, [], "at most"),
            (1 << 40, [], "budget"),
        ]
        for image_bytes, rows, why in wrong:
            with pytest.raises(Refused, match=why):
                rank.fill(image_bytes, rows)
        with pytest.raises(Refused, match="unlike lengths"):
            rank.ask(fill=pb.Fill(image_bytes=10, shards=[0], offsets=[1, 2], lengths=[1], to=[0]))
        with pytest.raises(Refused, match="that 4 ranks saved"):
            rank.manifests(17)
        allocated = nodes[0].status().allocated_bytes
        image, _ = rank.fill(30, [(0, 0, 10, 20), (0, 5, 10, 0)])
        assert (
            image
            == image_of(0, STEP, size_of(0))[5:15]
            + bytes(10)
            + (image_of(0, STEP, size_of(0))[:10])
        )
        many = [(3, 50 * i, 20, 20 * i) for i in range(100_000)]
        random.Random(1).shuffle(many)
        image, filled = rank.fill(20 * len(many), many)
        there = image_of(3, STEP, size_of(3))
        assert image == b"".join(there[50 * i : 50 * i + 20] for i in range(100_000))
        assert filled.bytes_received == 20 * len(many)
        new.save(STEP + 1, size_of)
        assert nodes[0].status().allocated_bytes <= allocated + 3 * size_of(1)
        with pytest.raises(Refused, match="superseded"):
            rank.fill(10, [(0, 0, 10, 0)])


def test_ranges_of_other_shards_after_an_ordinary_restore(
    cluster: Callable[..., Cluster],
) -> None:
    nodes = saved_by_four(cluster())
    with job([(node, 0) for node in nodes]) as same:
        assert {r.decision.saved_world for r in same.restore()} == {0}
        length = sum(size_of(s) // 4 for s in range(4))
        rows, at = [], 0
        for shard in range(4):
            rows.append((shard, 1000, size_of(shard) // 4, at))
            at += size_of(shard) // 4
        image, _ = same.ranks[2].fill(length, rows)
        assert image == b"".join(
            image_of(s, STEP, size_of(s))[1000 : 1000 + size_of(s) // 4] for s in range(4)
        )


def test_while_the_new_world_has_saved_nothing_the_old_shards_stay_protected(
    cluster: Callable[..., Cluster],
) -> None:
    """A node is lost after the decision; what it kept is rebuilt, and another may be lost."""
    nodes = saved_by_four(cluster(replace_s=6.0))
    with job([(nodes[0], 0), (nodes[1], 0)]) as new:
        new.restore(reshard=True)
        assert [f"4 ranks saved step {STEP}" in g.why for g in nodes[3].status().groups] == [True]
        plan = fetch_plan(nodes[3].address, "job", 5.0)
        assert (plan.restorable, plan.world, len(plan.shards)) == (True, 4, 4)
        nodes[3].lose()

        def losses() -> set[int]:
            return {g.further_losses for g in nodes[0].status().groups}

        eventually("the loss is known", lambda: losses() == {0})
        eventually("another may be lost", lambda: losses() == {1})
    nodes[2].lose()
    with job([(nodes[1], 0), (nodes[0], 0)]) as new:
        assert {r.decision.saved_world for r in new.restore(reshard=True)} == {4}
        check_filled(new, 2)
        new.save(STEP + 1, size_of)


def test_where_memory_is_scarce_a_spare_generation_makes_room(
    cluster: Callable[..., Cluster],
) -> None:
    """Two old generations and their parity, and one image twice as long: more than there is."""
    made = cluster(memory_budget="24MiB")
    nodes = made.start(4)
    with job([(node, 0) for node in nodes]) as old:
        old.restore()
        old.save(STEP - 1, size_of)
        old.save(STEP, size_of)
    with job([(nodes[0], 0), (nodes[1], 0)]) as new:
        new.restore(reshard=True)
        check_filled(new, 2)
        new.save(STEP + 1, size_of)
