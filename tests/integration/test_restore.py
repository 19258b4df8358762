"""A job comes back bit for bit, whatever died: real daemons, the ranks in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from snapshotd_client import SnapshotLost
from tests.integration.cluster import Cluster, eventually
from tests.integration.ranks import Job, alive, homes, segment_files

Make = Callable[..., Cluster]


def test_trainers_die_and_resume_from_local_memory(cluster: Make) -> None:
    nodes = cluster().start(4)
    job = Job(homes(nodes))
    assert job.restore() == [None] * 4
    job.train_protected(5)
    job.vanish()
    job = Job(homes(nodes))
    restored = job.restore()
    assert all(r.step == 4 and r.tier == "local" and r.values == {"seen": 40} for r in restored)
    job.check()
    job.train_protected(3)
    job.check()
    job.close()


def test_daemon_dies_training_goes_on_and_protection_returns(cluster: Make) -> None:
    nodes = cluster().start(4)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(3)
    nodes[1].kill()
    job.train(3)
    assert not job.ranks[1].snap.status().connected
    nodes[1].start()

    def back() -> bool:
        job.train(1)
        return all(r.snap.status().connected for r in job.ranks)

    eventually("the trainer has found its daemon again", back, pause_s=0.2)
    job.train_until_protected()
    job.check()
    held = nodes[1].status().slots[0].data
    assert held, "the restarted daemon has adopted or sealed something"
    job.close()


def test_steps_slower_than_the_clients_patience_find_the_daemon_again(cluster: Make) -> None:
    """What is answered between two steps must not be thrown away by asking anew."""
    nodes = cluster().start(2)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(1)
    nodes[1].kill()
    nodes[1].start()

    def back() -> bool:
        job.train(1)
        return job.ranks[1].snap.status().connected

    eventually("it is back", back, timeout_s=20, pause_s=2.5)
    job.train_until_protected()
    job.close()


def test_restarted_daemon_adopts_its_segments(cluster: Make) -> None:
    nodes = cluster().start(4)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(4)
    job.vanish()
    for node in nodes:
        node.kill()
    for node in nodes:
        node.start()
    job = Job(homes(nodes))
    restored = job.restore()
    assert all(r.step == 3 and r.tier == "local" for r in restored)
    job.check()
    job.close()


@pytest.mark.parametrize("parity", [1, 2])
def test_nodes_are_lost_and_replaced(cluster: Make, parity: int) -> None:
    made = cluster(parity=parity)
    nodes = made.start(4)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(4)
    job.vanish()
    lost = nodes[:parity]
    for node in lost:
        node.lose()
    survivors = [n.name for n in nodes[parity:]]
    replacements = [made.node(f"r{i}", seeds=survivors[:1]) for i in range(parity)]
    for node in replacements:
        node.start()
    job = Job(homes([*replacements, *nodes[parity:]]))
    restored = job.restore()
    assert [r.step for r in restored] == [3] * 4
    (tier,) = {r.tier for r in restored}
    # On a slow machine the replacements have rebuilt what was lost before anybody asks.
    assert tier in {"group", "local"}
    assert all((r.bytes_decoded > 0) == (tier == "group") for r in restored[:parity])
    assert all(r.bytes_decoded == 0 for r in restored[parity:])
    job.check()
    job.train_protected(3)
    job.check()
    job.close()


def test_two_successive_losses(cluster: Make) -> None:
    made = cluster()
    nodes = made.start(4)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    for turn in range(2):
        job.vanish()
        nodes[turn].lose()
        nodes[turn] = made.node(f"r{turn}", seeds=["n3"])
        nodes[turn].start()
        job = Job(homes(nodes))
        assert job.restore()[0].step == 1
        # No step is taken: the group protects the restored step again by itself.
        eventually(
            "the restored step is protected in the new group",
            lambda: all(r.snap.status().is_protected for r in job.ranks),  # noqa: B023
        )
    job.check()
    job.train_protected(2)
    job.check()
    job.close()


def test_more_losses_than_parity_are_a_clear_error_and_load_nothing(cluster: Make) -> None:
    made = cluster()
    nodes = made.start(4)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(3)
    job.vanish()
    for i in (1, 2):
        nodes[i].lose()
        nodes[i] = made.node(f"r{i}", seeds=["n0"])
        nodes[i].start()
    job = Job(homes(nodes))
    before = [r.digest() for r in job.ranks]
    for rank, error in zip(job.ranks, outcomes(job), strict=True):
        assert isinstance(error, SnapshotLost), f"rank {rank.rank}: {error!r}"
        assert "shard 1 is missing" in str(error)
        assert "shard 2 is missing" in str(error)
        assert "of the 3 blocks" in str(error)
        assert "n1" in str(error)
    assert [r.digest() for r in job.ranks] == before
    job.vanish()
    # The explicit way out.
    job = Job(homes(nodes))
    assert job.restore(on_lost="fresh") == [None] * 4
    assert [r.snap.status().committed_step for r in job.ranks] == [None] * 4
    job.train_protected(2)
    job.check()
    job.close()


def outcomes(job: Job) -> list[BaseException | None]:
    def one(rank) -> BaseException | None:
        try:
            rank.snap.restore()
        except Exception as error:  # noqa: BLE001  # the error is what is looked at
            return error
        return None

    return list(job._pool.map(one, job.ranks))


def test_ranks_land_on_other_nodes(cluster: Make) -> None:
    nodes = cluster().start(4)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(3)
    job.vanish()
    moved = [nodes[2], nodes[0], nodes[3], nodes[1]]
    job = Job(homes(moved))
    restored = job.restore()
    assert all(r.step == 2 and r.tier == "group" and r.bytes_copied > 0 for r in restored)
    job.check()
    job.train_protected(3)
    job.check()
    # What was moved away is given back: no slot keeps more than it needs.
    for node in nodes:
        facts = node.status().slots[0]
        assert len({d.shard for d in facts.data}) == 1
    job.close()


def test_loss_while_another_smp_restarts(cluster: Make) -> None:
    made = cluster()
    nodes = made.start(4)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(3)
    job.vanish()
    nodes[0].lose()
    nodes[2].kill()
    nodes[0] = made.node("r0", seeds=["n1"])
    nodes[0].start()
    nodes[2].start()
    job = Job(homes(nodes))
    restored = job.restore()
    # "local" where the lost shard was rebuilt on the newcomer before the trainers asked.
    assert {r.step for r in restored} == {2}
    job.check()
    job.train_protected(2)
    job.check()
    job.close()


def test_two_ranks_a_node_and_uneven_groups(cluster: Make) -> None:
    nodes = cluster(group_size=2).start(3)
    everywhere = [(node, slot) for node in nodes for slot in (0, 1)]
    job = Job(everywhere)
    job.restore()
    job.train_protected(2)
    job.check()
    job.vanish()
    job = Job(everywhere)
    assert job.restore()[0].step == 1
    job.check()
    job.close()


def test_clean_stop_leaves_segments_and_nothing_else(cluster: Make) -> None:
    nodes = cluster().start(2)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    job.close()
    pids = [pid for node in nodes for pid in node.smp_pids()]
    assert len(pids) == 2
    for node in nodes:
        node.stop()
        assert segment_files(node)
        left = {p.name for p in node.run_dir.iterdir()}
        assert left == {"lock", "trainer-0.lock", "job.job", "job.point"}
    eventually("SMPs are gone", lambda: not any(map(alive, pids)))
