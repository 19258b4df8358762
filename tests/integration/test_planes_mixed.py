"""Nodes that serve their blocks over unlike planes protect each other, and rebuild what is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from snapshotd.cli import main
from snapshotd.wire.protocol import GRPC, SOCKETS
from tests.integration.cluster import Cluster
from tests.integration.ranks import Job, homes


def test_one_node_over_grpc_the_others_over_sockets(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    made = cluster(group_size=3)
    nodes = [made.node(f"n{i}") for i in range(3)]
    for node, plane in zip(nodes, (SOCKETS, GRPC, SOCKETS), strict=True):
        text = node.config.read_text()
        node.config.write_text(text.replace("[protection]", f'[protection]\nplane = "{plane}"'))
        node.start()
    made.met()
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    assert [n.status().slots[0].plane for n in nodes] == [SOCKETS, GRPC, SOCKETS]
    assert main(["export", "--run-dir", str(nodes[0].run_dir), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / ".metadata").is_file()
    job.vanish()
    for lost in nodes[:2]:  # decoded from both kinds of nodes, and by both kinds
        lost.lose()
        (lost.root / "run").mkdir()
        lost.start()
        made.met()
        job = Job(homes(nodes))
        assert all(job.restore())
        job.train_protected(1)
        job.check()
        job.vanish()
