"""Memory that becomes short costs spare generations, then parity; all comes back with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from snapshotd.memory.preflight import snapshot_need
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd_client.predicting import predict_image_bytes
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Job, Rank, homes

BUDGET = 64 << 20


def fill(node: Node, left_bytes: int) -> Path:
    """Leave so much of a node's budget, as a job that nobody ended would."""
    ballast = node.shm_dir / "slot-9" / "data-0.seg"
    ballast.parent.mkdir()
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, BUDGET - left_bytes)
    return ballast


def image_bytes(world: int) -> int:
    return max(predict_image_bytes(Rank(r, world).states()) for r in range(world))


def group_of(node: Node) -> pb.GroupStatus:
    (found,) = node.status().groups
    return found


def test_parity_is_given_up_while_there_is_no_room_for_it(
    cluster: Callable[..., Cluster],
) -> None:
    nodes = cluster(parity=2, memory_budget=BUDGET).start(3)
    job = Job(homes(nodes))
    job.restore()
    # Two local generations fit, and some parity of one of them.
    ballast = fill(nodes[1], snapshot_need(image_bytes(3), 2, 1, 0).bytes + (16 << 10))

    def local_only() -> bool:
        job.train(1)
        found = [g for n in nodes for g in n.status().groups]
        return len(found) == 3 and all(
            "2 parity block(s) a stripe are not kept" in g.why and g.further_losses == 0
            for g in found
        )

    eventually("snapshots are local only", local_only, pause_s=0.2)
    assert "memory is short on n1/0" in group_of(nodes[0]).why

    def told() -> bool:
        job.train(1)
        said = job.ranks[0].snap.status()
        return not said.is_protected and "2 parity block(s)" in said.why_not

    eventually("the trainer is told", told, pause_s=0.2)
    eventually("it is not healthy", lambda: not nodes[0].status().healthy)
    committed = group_of(nodes[0]).version.step
    eventually(
        "local snapshots go on being committed",
        lambda: job.train(1) or group_of(nodes[0]).version.step > committed,
        pause_s=0.2,
    )
    ballast.unlink()

    def whole_again() -> bool:
        job.train(1)
        return all(group_of(n).further_losses == 2 and not group_of(n).why for n in nodes)

    eventually("all parity is kept again", whole_again, timeout_s=60, pause_s=0.2)
    eventually("it is healthy", lambda: nodes[0].status().healthy)
    job.train_until_protected()
    job.check()
    job.close()


def test_spare_generations_go_first(cluster: Callable[..., Cluster]) -> None:
    nodes = cluster(generations=4, memory_budget=BUDGET).start(2)
    job = Job(homes(nodes))
    job.restore()
    size = image_bytes(2)
    left = snapshot_need(size, 3, 2, 1).bytes
    assert snapshot_need(size, 2, 2, 1).bytes < left < snapshot_need(size, 4, 2, 1).bytes
    ballast = fill(nodes[1], left)
    job.train_until_protected()

    def short() -> bool:
        job.train_until_protected()
        return "no spare generations" in group_of(nodes[0]).why

    eventually("the slot is short", short, pause_s=0.2)
    for _ in range(3):
        job.train_until_protected()
    group = group_of(nodes[0])
    assert group.further_losses == 1
    assert "parity" not in group.why
    ballast.unlink()
    eventually("there is room again", lambda: not group_of(nodes[0]).why)
    job.check()
    job.close()
