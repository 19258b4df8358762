"""A step in the tier, saved by one number of ranks and taken up by another: ranges of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotd_client.errors import Refused
from tests.integration.bare import MANIFEST_BYTES, BareJob, image_of
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.layouts import run
from tests.integration.test_persist import EVERY, flip, images, lose_all, whole
from tests.integration.test_reshard import STEP, check_filled, homes_of, job, rows_of, size_of

Make = Callable[..., Cluster]
GRAIN = 32_768


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    path = tmp_path / "tier"
    path.mkdir()
    return path


def saved_and_lost(made: Cluster, tier: Path, *steps: int) -> list[Node]:
    """Four ranks saved steps to the tier; then all daemons and all memory are gone."""
    nodes = made.start(4)
    with job([(node, 0) for node in nodes]) as old:
        old.restore()
        for step in steps or (STEP,):
            old.save(step, size_of)
            eventually(f"step {step} is whole", lambda s=step: whole(tier)[-1:] == [s], 60)
    return lose_all(made, nodes)


def check_stored(new: BareJob, world: int) -> None:
    """Equal bytes, all of them out of the tier, and of its files only the grains touched."""
    for rank, filled in enumerate(check_filled(new, world)):
        _, rows = rows_of(rank, world, 4)
        wanted = sum(r[2] for r in rows)
        assert (filled.bytes_stored, filled.bytes_copied, filled.bytes_decoded) == (wanted, 0, 0)
        assert wanted <= filled.bytes_received <= wanted + 2 * GRAIN * len(rows)


@pytest.mark.parametrize("world", [2, 3, pytest.param(6, marks=pytest.mark.extended)])
def test_another_world_reads_the_ranges_it_needs(cluster: Make, tier: Path, world: int) -> None:
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = saved_and_lost(made, tier)
    with job(homes_of(nodes, world)) as new:
        for restored in new.restore(reshard=True):
            decision = restored.decision
            assert (decision.restore.step, decision.saved_world, decision.tier) == (STEP, 4, 4)
        found = new.ranks[-1].manifests()
        assert found == {
            s: (image_of(s, STEP, size_of(s))[:MANIFEST_BYTES], size_of(s)) for s in range(4)
        }
        check_stored(new, world)
        some, filled = new.ranks[0].fill(40, [(1, 2_000_001, 10, 5), (1, 4_000_001, 10, 20)])
        image = image_of(1, STEP, size_of(1))
        assert some == bytes(5) + image[2_000_001:2_000_011] + bytes(5) + (
            image[4_000_001:4_000_011] + bytes(10)
        )
        assert filled.bytes_received <= 2 * GRAIN
        # From then on it is an ordinary job, whose next step is written as any other.
        new.save(STEP + 1, size_of)
        eventually("the next step is whole", lambda: whole(tier) == [STEP, STEP + 1], 60)
    with job(homes_of(nodes, world)) as again:
        assert {r.decision.restore.step for r in again.restore()} == {STEP + 1}


def test_who_cannot_take_another_world_is_told_so(cluster: Make, tier: Path) -> None:
    nodes = saved_and_lost(cluster(persist={"url": str(tier), **EVERY}), tier)
    with job(homes_of(nodes, 2)) as new:
        for refusal in new.each(lambda r: r.refusal(reshard=r.rank < 1)):
            assert "by 4 ranks, and 2 ask to restore it; not able to: rank 1" in refusal
    # A crash before the first commit: memory has nothing, the tier has it still, for any number.
    for world in (3, 2):
        with job(homes_of(nodes, world)) as new:
            assert {r.decision.saved_world for r in new.restore(reshard=True)} == {4}
            check_stored(new, world)
    with job(homes_of(nodes, 4)) as same:
        restored = same.restore()
        assert {(r.decision.restore.step, r.decision.saved_world) for r in restored} == {(STEP, 0)}


def test_what_is_missing_or_cut_sends_all_to_an_older_step(cluster: Make, tier: Path) -> None:
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = saved_and_lost(made, tier, STEP - 2, STEP - 1, STEP)
    images(tier, STEP)[3].unlink()
    cut = images(tier, STEP - 1)[2]
    with cut.open("r+b") as file:
        file.truncate(size_of(2) - 1)
    with job(homes_of(nodes, 2)) as new:
        assert {r.decision.restore.step for r in new.restore(reshard=True)} == {STEP - 2}
    said = "".join(node.log.read_text() for node in nodes)
    assert "shard-00003.image is missing" in said
    assert "shard-00002.image has no" in said


def test_damage_that_a_rank_comes_upon_is_an_error_and_then_an_older_step(
    cluster: Make, tier: Path
) -> None:
    """Nobody has read that grain before the answer; the next try knows of it."""
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = saved_and_lost(made, tier, STEP - 1, STEP)
    damaged = images(tier, STEP)[1]
    flip(damaged)
    with job(homes_of(nodes, 2)) as new:
        assert {r.decision.restore.step for r in new.restore(reshard=True)} == {STEP}
        length, rows = rows_of(0, 2, 4)
        with pytest.raises(Refused, match=r"shard-00001\.image: bytes .* differ from") as caught:
            new.ranks[0].fill(length, rows)
        assert "an older step" in str(caught.value)
    with job(homes_of(nodes, 2)) as new:
        assert {r.decision.restore.step for r in new.restore(reshard=True)} == {STEP - 1}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_state_comes_back_on_other_ranks_in_another_parallelism(
    cluster: Make, tier: Path, tmp_path: Path
) -> None:
    """FSDP on four ranks; then, from the tier alone, DDP on two and FSDP on three."""
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = made.start(4)
    first = run(nodes, 4, "fsdp", tmp_path, steps=2)
    eventually("step 1 is whole", lambda: whole(tier)[-1:] == [1], 60)
    for kind, world in (("ddp", 2), ("fsdp", 3)):
        nodes = lose_all(made, nodes)
        # The first run of these trains no step, so that both take up what the four saved.
        for out in run(nodes[:world], world, kind, tmp_path, steps=0):
            assert out["came back"] == first[0]["left"]
            restored = out["restored"]
            assert (restored["step"], restored["saved_world"]) == (1, 4)
            assert restored["tier"] == "persistent"
            assert restored["bytes_stored"] > 0
            assert restored["bytes_copied"] == restored["bytes_decoded"] == 0
