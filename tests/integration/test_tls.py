"""Certificates: a job over TLS, and whoever does not show the right one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from snapshotd.cli import main
from snapshotd.errors import PeerError
from snapshotd.rpc.operator import fetch_status
from snapshotd.rpc.tls import Identity, TlsFiles
from snapshotd.wire.protocol import PROTOCOL_VERSION
from snapshotd.wire.v1 import node_pb2 as pb
from tests.integration import wires
from tests.integration.authority import Authority
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Job, homes

Clusters = Callable[..., Cluster]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def started(cluster: Cluster, authority: Authority, *names: str) -> list[Node]:
    nodes = [cluster.node(name, tls=authority.of(name)) for name in names]
    for node in nodes:
        node.start()
    cluster.met()
    return nodes


def reason(node: Node, peer: str) -> str:
    """Why a node does not speak with another, as its status says."""
    return next((m.reason for m in node.status().members if m.node == peer), "")


def test_a_job_over_tls(
    cluster: Clusters,
    authority: Authority,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    made = cluster(group_size=2)
    nodes = started(made, authority, "n0", "n1")
    assert " with TLS" in nodes[0].tail()
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    assert main(["status", "--run-dir", str(nodes[0].run_dir)]) == 0
    assert main(["status", "--config", str(nodes[0].config), "--address", nodes[1].address]) == 0
    assert "n1" in capsys.readouterr().out
    assert main(["export", "--run-dir", str(nodes[0].run_dir), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / ".metadata").is_file()
    job.vanish()
    nodes[1].lose()
    (nodes[1].root / "run").mkdir()
    nodes[1].start()
    made.met()
    again = Job(homes(nodes))
    found = again.restore()
    assert [f.step for f in found if f] == [1, 1]
    again.train_protected(1)
    again.check()
    again.close()
    for node in nodes:
        node.stop()


def test_a_node_of_another_authority(
    cluster: Clusters, authority: Authority, tmp_path: Path
) -> None:
    made = cluster(group_size=2)
    (mine,) = started(made, authority, "n0")
    stranger = made.node("n1", tls=Authority(tmp_path / "other").of("n1"))
    stranger.start()
    # Each dials: n0 because its configuration names n1, n1 because its own names n0.
    eventually("n1 says why", lambda: "not signed by the CA" in reason(stranger, "n0"))
    assert f"n0 at {mine.address}: its certificate is not signed" in stranger.tail()
    mine.stop()
    mine.config.write_text(
        mine.config.read_text().replace("[peers]\n", f'[peers]\nn1 = "{stranger.address}"\n')
    )
    mine.start()
    eventually("n0 says why", lambda: "not signed by the CA" in reason(mine, "n1"))
    assert f"n1 at {stranger.address}: its certificate is not signed" in mine.tail()
    assert [m.node for m in mine.status().members if m.state == "live"] == ["n0"]


def test_a_seed_that_is_another_node(cluster: Clusters, authority: Authority) -> None:
    made = cluster(group_size=2)
    (mine,) = started(made, authority, "n0")
    other = made.node("n1", seeds=[], tls=authority.of("n1"))
    text = other.config.read_text()
    other.config.write_text(text.replace("[peers]\n", f'[peers]\nn7 = "{mine.address}"\n'))
    other.start()
    what = "it shows the certificate of another node or cluster than n7.test"
    eventually("n1 says why", lambda: what in other.tail())


def call(node: Node, tls: TlsFiles, method: str, message: object) -> bytes:
    """A call with a certificate. Raises grpc.RpcError."""
    identity = Identity.load(tls, "test")
    options = [("grpc.ssl_target_name_override", "test"), ("grpc.enable_http_proxy", 0)]
    if method == "Blocks/Store":
        wires.store(wires.blocks(node), [message], identity)
    with grpc.secure_channel(node.address, identity.channel(), options) as channel:
        path = f"/snapshotd.wire.v1.{method}"
        stub = channel.unary_unary(path, lambda m: m.SerializeToString(), None)
        return stub(message, timeout=10)


def test_who_speaks_in_another_s_name(cluster: Clusters, authority: Authority) -> None:
    made = cluster(group_size=2)
    nodes = started(made, authority, "n0", "n1")
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(1)
    thief = authority.of("n2")
    lie = pb.NodeFacts(
        protocol=PROTOCOL_VERSION,
        cluster_id="test",
        node="n1",
        boot="9" * 25,
        sequence=1,
        address="127.0.0.1:1",
    )
    opening = pb.StoreOpening(protocol=PROTOCOL_VERSION, cluster_id="test", job="job", epoch=1)
    opening.place.shards.extend([0, 1])
    opening.place.parity = 1
    opening.sender.node = "n1"
    for method, message in (
        ("Node/Exchange", pb.Telling(whole=lie)),
        ("Blocks/Store", pb.StoreRequest(opening=opening)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(nodes[0], thief, method, message)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        said = caught.value.details()
        assert "said that it is node 'n1', but shows a certificate of n2.test, test" in said
    job.train_protected(1)
    job.check()
    job.close()


def test_an_operator_of_another_cluster(cluster: Clusters, authority: Authority) -> None:
    """The same authority signed his certificate, but not for this cluster."""
    (node,) = started(cluster(group_size=2), authority, "n0")
    foreign = Identity.load(authority.issue("n0.other", "other"), "other")
    asking = dataclasses.replace(foreign, cluster_id="test")
    with pytest.raises(PeerError, match=r"shows a certificate of n0\.other, other, not of test"):
        fetch_status(
            node.address,
            5.0,
            asking,
        )


def test_plain_against_tls(
    cluster: Clusters, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cluster(group_size=2)
    (mine,) = started(made, authority, "n0")
    plain = made.node("n1")
    plain.start()
    eventually("the plain one says why", lambda: "which this node does not" in plain.tail())
    mine.stop()
    mine.config.write_text(
        mine.config.read_text().replace("[peers]\n", f'[peers]\nn1 = "{plain.address}"\n')
    )
    mine.start()
    what = "it does not speak TLS, and this node does: set [tls] on all nodes or on none"
    eventually("the other, too", lambda: what in reason(mine, "n1"))
    with pytest.raises(PeerError, match="it may speak TLS"):
        fetch_status(mine.address, 5.0)
    assert main(["status", "--config", str(plain.config), "--address", mine.address]) != 0
    said = capsys.readouterr().err
    assert "it may speak TLS, which this node does not" in said
    assert "--config" in said
