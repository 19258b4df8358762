"""A lost node's state is rebuilt without its trainers, and a damaged snapshot has one before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from snapshotd.wire.protocol import HEADER_BYTES
from snapshotd.wire.v1 import node_pb2 as pb
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.damage import committed_file, flip
from tests.integration.ranks import Job, homes


def group_of(node: Node) -> pb.GroupStatus:
    (found,) = node.status().groups
    return found


def kept_by(keepers: list[Node]) -> bool:
    """Each of these nodes, and no other, keeps the group, which can lose one of them."""
    names = {n.name for n in keepers}
    found = [g for n in keepers for g in n.status().groups]
    return len(found) == len(keepers) and all(
        {h.node for h in g.homes} == names and g.further_losses == 1 and "has not" not in g.why
        for g in found
    )


def trained(nodes: list[Node]) -> int:
    """Train some steps and die; returns the committed one."""
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(3)
    job.vanish()
    assert kept_by(nodes)
    return job.next_step - 1


def resumes(nodes: list[Node], step: int) -> Job:
    """The job starts on these nodes, and every byte is what it was."""
    job = Job(homes(nodes))
    assert {r.step for r in job.restore() if r is not None} == {step}
    job.check()
    return job


def test_a_stand_in_takes_the_place_of_a_lost_node(cluster: Callable[..., Cluster]) -> None:
    made = cluster()
    nodes = made.start(3)
    spare = made.node("spare")
    spare.start()
    step = trained(nodes)
    nodes[1].lose()
    eventually("it is protected again", lambda: kept_by([nodes[0], spare, nodes[2]]))
    (job,) = spare.status().jobs
    assert job.committed.step == step
    # Another loss, which would have been one too many.
    nodes[2].lose()
    for name in ("late0", "late1"):
        made.node(name).start()
    made.met()
    resumes([nodes[0], made.nodes["late0"], made.nodes["late1"]], step).close()


def test_a_stand_in_without_room_is_passed_over(cluster: Callable[..., Cluster]) -> None:
    made = cluster(replace_s=8.0)
    nodes = made.start(3)
    small = made.node("a-small-spare", memory_budget="16KiB")
    small.start()
    made.met()
    step = trained(nodes)
    nodes[1].lose()
    eventually("two nodes keep three shards", lambda: kept_by([nodes[0], nodes[2]]), 60.0)
    assert "a-small-spare" in nodes[0].tail() + small.tail()
    nodes[1].run_dir.mkdir()
    nodes[1].start()
    made.met()
    resumes(nodes, step).close()


def test_an_empty_replacement_of_the_same_name_is_filled(cluster: Callable[..., Cluster]) -> None:
    made = cluster()
    nodes = made.start(3)
    step = trained(nodes)
    nodes[1].lose()
    nodes[1].run_dir.mkdir()
    nodes[1].start()
    made.met()
    eventually("it is protected again", lambda: kept_by(nodes))
    nodes[0].lose()
    nodes[0].run_dir.mkdir()
    nodes[0].start()
    made.met()
    resumes(nodes, step).close()


def test_the_group_shrinks_when_no_replacement_comes(cluster: Callable[..., Cluster]) -> None:
    made = cluster(replace_s=6.0)
    nodes = made.start(4)
    step = trained(nodes)
    nodes[3].lose()
    eventually("three nodes keep four shards", lambda: kept_by(nodes[:3]))
    assert "n3/0 is lost, shard 3 is kept on" in group_of(nodes[0]).why
    nodes[0].lose()
    for node in (nodes[0], nodes[3]):
        node.run_dir.mkdir()
        node.start()
    made.met()
    job = resumes(nodes, step)
    job.train_until_protected()
    eventually(
        "nothing is kept elsewhere any more", lambda: not any(group_of(n).why for n in nodes)
    )
    job.close()
    for node in nodes:
        held = {d.shard for s in node.status().slots for d in s.data}
        assert len(held) == 1, f"{node.name} still keeps shards {held}"


def test_a_node_that_comes_back_with_its_memory_is_not_rebuilt(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(replace_s=6.0)
    nodes = made.start(3)
    step = trained(nodes)
    nodes[2].kill()
    eventually("two nodes keep three shards", lambda: kept_by(nodes[:2]))
    nodes[2].start()
    made.met()

    def settled() -> bool:
        held = [{d.shard for s in n.status().slots for d in s.data} for n in nodes]
        return held == [{0}, {1}, {2}] and kept_by(nodes)

    eventually("each node keeps its own shard", settled)
    resumes(nodes, step).close()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_damaged_snapshot_has_the_one_before_it(
    cluster: Callable[..., Cluster], restarted: bool
) -> None:
    """Two of three shards of the newest step are damaged, which one parity block cannot mend.

    Both blocks of each: of one that is found first, the other's whole block would mend it.
    """
    nodes = cluster().start(3)
    step = trained(nodes)
    held = {n.name: [d for s in n.status().slots for d in s.data] for n in nodes}
    for node in nodes[:2]:
        if restarted:
            node.kill()
        damaged = committed_file(node, "data")
        (size,) = {d.image_bytes for d in held[node.name] if d.version.step == step}
        for part in (1, 3):
            flip(damaged, HEADER_BYTES + part * size // 4)
    for node in nodes[:2] if restarted else ():
        node.start()
    job = resumes(nodes, step - 1)
    job.train_protected(2)
    job.check()
    job.close()
