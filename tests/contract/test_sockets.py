"""What only the plane of plain sockets has: its connections, and who may speak on them."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snapshotd.errors import PeerError
from snapshotd.rpc import dialling, socket_service
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.channels import NotTrusted, Peer
from snapshotd.rpc.connection import ALIGNMENT, Connection, HungUp, Kind, Stalled
from snapshotd.rpc.tls import Identity
from snapshotd.wire.protocol import MAX_CONTROL_BYTES, PROTOCOL_VERSION, TRANSFER_BYTES
from snapshotd.wire.v1 import node_pb2 as pb
from tests.contract.planes import (
    HOST,
    STALL_S,
    VERSION,
    Holder,
    Plane,
    SocketPlane,
    Source,
    record_of,
)
from tests.contract.test_planes import read, store, whole
from tests.integration.authority import Authority

IMAGE = bytes(range(256)) * (2 * TRANSFER_BYTES // 256)
Act = Callable[[Peer, BlocksClient], Awaitable[None]]


def run(act: Act, plane: Plane | None = None, holder: Holder | None = None) -> Source:
    plane = plane or SocketPlane(None)
    source = Source(IMAGE, record_of(IMAGE))

    async def both() -> None:
        async with (
            plane.serving(source, holder or Holder(len(IMAGE))) as peer,
            plane.client() as client,
        ):
            await act(peer, client)

    asyncio.run(both())
    return source


def dialled(peer: Peer) -> socket.socket:
    host, _, port = peer.address.rpartition(":")
    return socket.create_connection((host, int(port)))


def sockets_here() -> int:
    """Sockets that this process has open."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:
            continue  # that of this very look
    return sum(link.startswith("socket:") for link in links)


# -- connections


@pytest.fixture
def dials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses, each time that a connection is made."""
    made: list[str] = []
    real = dialling._connected

    async def counted(address: str) -> socket.socket:
        made.append(address)
        return await real(address)

    monkeypatch.setattr(dialling, "_connected", counted)
    return made


def test_a_connection_serves_one_stream_after_the_other(dials: list[str]) -> None:
    async def act(peer: Peer, client: BlocksClient) -> None:
        for _ in range(3):
            assert await read(client, peer, 0, len(IMAGE)) == IMAGE
            assert await client.record(peer, "job", VERSION, 0) == record_of(IMAGE)
            await store(client, peer, whole(IMAGE), len(IMAGE))

    run(act)
    assert len(dials) == 1


def test_streams_at_once_have_a_connection_each(dials: list[str]) -> None:
    async def act(peer: Peer, client: BlocksClient) -> None:
        found = await asyncio.gather(*(read(client, peer, 0, len(IMAGE)) for _ in range(3)))
        assert found == [IMAGE] * 3

    run(act)
    assert len(dials) == 3


def test_what_was_broken_off_is_not_used_again(dials: list[str]) -> None:
    async def act(peer: Peer, client: BlocksClient) -> None:
        reader = client.read(peer, "job", VERSION, 0, 0, len(IMAGE))
        await reader.chunk()
        reader.cancel()
        assert await read(client, peer, 0, len(IMAGE)) == IMAGE

    run(act)
    assert len(dials) == 2


def test_a_connection_that_the_other_end_closed_is_not_used_again(dials: list[str]) -> None:
    plane = SocketPlane(None)
    source = Source(IMAGE, record_of(IMAGE))

    async def act() -> None:
        async with plane.client() as client:
            for _ in range(2):
                async with plane.serving(source, Holder(0)) as peer:
                    assert await read(client, peer, 0, len(IMAGE)) == IMAGE
                    (_, kept) = client._sockets._idle[-1]
                assert not kept.is_idle()
                with pytest.raises(PeerError, match="cannot be reached"):
                    await read(client, peer, 0, len(IMAGE))

    asyncio.run(act())


def test_nothing_is_left_open() -> None:
    before = sockets_here()

    async def act(peer: Peer, client: BlocksClient) -> None:
        await read(client, peer, 0, len(IMAGE))
        reader = client.read(peer, "job", VERSION, 0, 0, len(IMAGE))
        await reader.chunk()
        reader.cancel()
        assert sockets_here() > before

    run(act)
    assert sockets_here() == before


def test_who_dials_and_asks_nothing_is_hung_up_on() -> None:
    async def act(peer: Peer, client: BlocksClient) -> None:
        with dialled(peer) as silent:
            silent.settimeout(20 * STALL_S)
            assert await asyncio.to_thread(silent.recv, 1) == b""

    run(act)


@pytest.mark.parametrize(
    "said",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" * 10,
        bytes(2 * ALIGNMENT),
        b"R" + MAX_CONTROL_BYTES.to_bytes(4, "big") + bytes(ALIGNMENT),
        b"R" + (2**32 - 1).to_bytes(4, "big") + bytes(ALIGNMENT),
        b"R" + (3).to_bytes(4, "big") + bytes(ALIGNMENT - 5) + b"\xff\xff\xff" + bytes(61),
    ],
    ids=["another protocol", "zeros", "a long request", "an endless one", "no message"],
)
def test_who_says_nonsense_is_hung_up_on(said: bytes) -> None:
    async def act(peer: Peer, client: BlocksClient) -> None:
        with dialled(peer) as other:
            other.settimeout(20 * STALL_S)
            other.sendall(said)
            with suppress(ConnectionResetError):
                assert await asyncio.to_thread(other.recv, 1) == b""
        assert await read(client, peer, 0, len(IMAGE)) == IMAGE

    run(act)


def test_more_connections_than_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_service, "MAX_CONNECTIONS", 2)

    async def act(peer: Peer, client: BlocksClient) -> None:
        reader = client.read(peer, "job", VERSION, 0, 0, len(IMAGE))
        await reader.record()
        with dialled(peer), dialled(peer) as further:
            further.settimeout(20 * STALL_S)
            assert await asyncio.to_thread(further.recv, 1) == b""
        await reader.chunk()
        reader.cancel()

    run(act)


def test_whose_stream_is_over_makes_room_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers keep their connections: of a large cluster there are more than one slot serves."""
    monkeypatch.setattr(socket_service, "MAX_CONNECTIONS", 2)

    async def act(peer: Peer, client: BlocksClient) -> None:
        plane = SocketPlane(None)
        async with plane.client() as second, plane.client() as third:
            for reader in (client, second, third, second, client):
                assert await read(reader, peer, 0, len(IMAGE)) == IMAGE

    run(act)


def test_a_request_of_another_cluster_or_protocol() -> None:
    def ask(peer: Peer, **wrong: object) -> str:
        right: dict[str, Any] = {"protocol": PROTOCOL_VERSION, "cluster_id": "test", "job": "job"}
        request = pb.ReadRequest(**{**right, **wrong})
        raw = Connection(dialled(peer), STALL_S)
        raw.send(Kind.READ, request.SerializeToString())
        kind, count = raw.head()
        assert kind is Kind.REFUSED
        said = raw.body(count).decode()
        with pytest.raises(HungUp):
            raw.head()
        raw.close()
        return said

    async def act(peer: Peer, client: BlocksClient) -> None:
        for wrong, what in (
            ({"cluster_id": "other"}, "belongs to cluster 'other', this node to 'test'"),
            ({"protocol": 9}, "speaks protocol 9, this node 1"),
        ):
            said = await asyncio.to_thread(ask, peer, **wrong)
            assert said.startswith("failed_precondition: ")
            assert what in said

    run(act)


def test_a_plane_that_is_not_known_here() -> None:
    async def act(peer: Peer, client: BlocksClient) -> None:
        with pytest.raises(PeerError, match="n0 serves blocks over 'pigeons'"):
            client.read(peer._replace(plane="pigeons"), "job", VERSION, 0, 0, 0)

    run(act)


@pytest.mark.parametrize("length", [0, 1, ALIGNMENT - 1, ALIGNMENT, 3 * ALIGNMENT + 1])
def test_frames_of_any_length(length: int) -> None:
    ours, theirs = (Connection(s, STALL_S) for s in pair())
    body = bytes(range(256))[:length]
    for kind in Kind:
        ours.send(kind, body)
    for kind in Kind:
        assert theirs.head() == (kind, length)
        assert theirs.body(length) == body
    assert theirs.is_idle()
    ours.close()
    with pytest.raises(HungUp):
        theirs.head()
    theirs.close()


def test_a_frame_that_trickles() -> None:
    """Each byte comes in time, the frame does not."""
    ours, theirs = pair()
    receiving, heard = Connection(theirs, 0.2), threading.Event()

    def trickle() -> None:
        while not heard.wait(0.02):
            ours.send(b"x")

    with ThreadPoolExecutor(1) as pool:
        trickling = pool.submit(trickle)
        with pytest.raises(Stalled):
            receiving.head()
        heard.set()
        trickling.result()
    receiving.close()
    ours.close()


def test_a_socket_that_is_none_of_ours_is_not_kept_open() -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(OSError, match="not supported"):
        Connection(ours, STALL_S)
    assert ours.fileno() == -1


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server((HOST, 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


# -- certificates


def identity(authority: Authority, node: str) -> Identity:
    return Identity.load(authority.of(node), "test", node)


def secured(act: Act, authority: Authority) -> None:
    run(act, SocketPlane(identity(authority, "n0")))


async def refused_as(who: Identity | None, peer: Peer, what: str) -> None:
    async with SocketPlane(who).client() as client:
        with pytest.raises(PeerError, match=what) as caught:
            await read(client, peer, 0, len(IMAGE))
        if "failed" not in what:
            assert isinstance(caught.value, NotTrusted)


def test_who_is_not_of_the_authority(tmp_path: Path) -> None:
    stranger = identity(Authority(tmp_path / "other"), "n1")

    async def act(peer: Peer, client: BlocksClient) -> None:
        await refused_as(stranger, peer, "n0 at .*: its certificate is not signed by the CA")
        assert await read(client, peer, 0, len(IMAGE)) == IMAGE

    secured(act, Authority(tmp_path / "ca"))


def test_who_shows_no_certificate(tmp_path: Path) -> None:
    mine = identity(Authority(tmp_path / "ca"), "n0")

    async def act(peer: Peer, client: BlocksClient) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        raw = Connection(dialled(peer), STALL_S)
        await asyncio.to_thread(raw.secure, context, False)
        with pytest.raises(HungUp):
            await asyncio.to_thread(raw.head)
        raw.close()

    run(act, SocketPlane(mine))


def test_a_node_that_is_another_than_was_meant(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")

    async def act(peer: Peer, client: BlocksClient) -> None:
        what = "n7 at .*: it shows the certificate of another node or cluster than n7.test"
        await refused_as(identity(authority, "n1"), peer._replace(node="n7"), what)

    secured(act, authority)


def test_a_caller_of_another_cluster(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    foreign = Identity.load(authority.issue("n0.other", "other"), "other")

    async def act(peer: Peer, client: BlocksClient) -> None:
        raw = Connection(dialled(peer), STALL_S)
        await asyncio.to_thread(raw.secure, foreign.dialling, False)
        request = pb.ReadRequest(protocol=PROTOCOL_VERSION, cluster_id="test", job="job")
        raw.send(Kind.READ, request.SerializeToString())
        kind, count = await asyncio.to_thread(raw.head)
        assert kind is Kind.REFUSED
        said = (await asyncio.to_thread(raw.body, count)).decode()
        assert said.startswith("failed_precondition: ")
        assert "shows a certificate of n0.other, other, not of test" in said
        raw.close()

    secured(act, authority)


def test_parity_in_another_s_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")

    async def act(peer: Peer, client: BlocksClient) -> None:
        async with SocketPlane(identity(authority, "n1")).client() as thief:
            what = r"said that it is node 'n0', but shows a certificate of n1\.test, test"
            with pytest.raises(PeerError, match=what):
                await store(thief, peer, whole(IMAGE), len(IMAGE))

    secured(act, authority)


def test_plain_against_tls(tmp_path: Path) -> None:
    mine = identity(Authority(tmp_path / "ca"), "n0")

    async def against_tls(peer: Peer, client: BlocksClient) -> None:
        await refused_as(None, peer, "reading a block at .* failed")

    async def against_plain(peer: Peer, client: BlocksClient) -> None:
        await refused_as(mine, peer, "n0 at .*: it ")

    run(against_tls, SocketPlane(mine))
    run(against_plain)
