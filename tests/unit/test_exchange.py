"""Facts between two supervisors: one stream for many exchanges, and its end does no harm."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from snapshotd.core.membership import Refusal
from snapshotd.errors import PeerError
from snapshotd.metadata import NodeFacts
from snapshotd.rpc import node as node_module
from snapshotd.rpc.channels import CONTROL_OPTIONS, Channels, Peer
from snapshotd.rpc.exchange import Exchanges, RefusedByPeer
from snapshotd.rpc.node import NODE_SERVICE, NodeServer, NodeService
from snapshotd.rpc.telling import Tellings
from snapshotd.wire.v1 import node_pb2 as pb

MINE = NodeFacts("c", "a", "b1", 1, "127.0.0.1:1")
THEIRS = NodeFacts("c", "b", "b1", 1, "127.0.0.1:2")
GRACE_S = 30.0


class Supervised:
    def __init__(self) -> None:
        self.heard: list[NodeFacts] = []
        self.own = THEIRS
        self.refusal: Refusal | None = None

    def hear(self, facts: NodeFacts) -> Refusal | None:
        self.heard.append(facts)
        return self.refusal

    def facts(self) -> NodeFacts:
        return self.own

    def status(self) -> pb.NodeStatus:
        return pb.NodeStatus()

    def plan(self, job: str) -> pb.PlanReply:
        return pb.PlanReply(job=job)

    def drop(self, job: str) -> int:
        return len(job)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each stream that was opened to a server of this process."""
    opened: list[int] = []
    plain = NodeService.Exchange

    async def counted(*arguments: object) -> None:
        opened.append(1)
        await plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(NodeService, "Exchange", counted)
    return opened


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"127.0.0.1:{found.getsockname()[1]}"


@asynccontextmanager
async def asking(timeout_s: float = 5.0) -> AsyncIterator[Exchanges]:
    made = Exchanges(Channels(None, CONTROL_OPTIONS), Tellings(), timeout_s)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def serving(peer: Supervised, address: str) -> AsyncIterator[NodeServer]:
    server = NodeServer(peer, None, Tellings())
    await server.start(address)
    try:
        yield server
    finally:
        await server.stop(GRACE_S)


def test_many_exchanges_take_one_stream(streams: list[int]) -> None:
    async def part() -> None:
        peer, address = Supervised(), free_address()
        async with serving(peer, address), asking() as exchanges:
            for sequence in range(1, 6):
                peer.own = replace(THEIRS, sequence=sequence)
                facts = replace(MINE, sequence=sequence)
                assert await exchanges.exchange(Peer("b", address), facts) == peer.own
                assert peer.heard[-1] == facts
            assert len(streams) == 1
            exchanges.leave("b")
            assert await exchanges.exchange(Peer("b", address), MINE) == peer.own
            assert len(streams) == 2

    asyncio.run(part())


def test_a_refusal_ends_the_stream_and_no_more(streams: list[int]) -> None:
    async def part() -> None:
        peer, address = Supervised(), free_address()
        async with serving(peer, address), asking() as exchanges:
            await exchanges.exchange(Peer("b", address), MINE)
            for fatal in (False, True):
                peer.refusal = Refusal("not you", fatal=fatal)
                with pytest.raises(RefusedByPeer, match="not you") as caught:
                    await exchanges.exchange(Peer("b", address), MINE)
                assert caught.value.fatal is fatal
            peer.refusal = None
            assert await exchanges.exchange(Peer("b", address), MINE) == THEIRS
            assert len(streams) == 3

    asyncio.run(part())


def test_a_silent_stream_ends_and_another_is_opened(
    streams: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "EXCHANGE_SILENCE_S", 0.05)

    async def part() -> None:
        peer, address = Supervised(), free_address()
        async with serving(peer, address), asking() as exchanges:
            for _ in range(4):
                assert await exchanges.exchange(Peer("b", address), MINE) == THEIRS
                await asyncio.sleep(0.1)
        assert len(streams) == 4

    asyncio.run(part())


def test_open_streams_do_not_delay_a_stop_and_a_restarted_peer_is_found() -> None:
    async def part() -> None:
        address = free_address()
        async with asking() as exchanges:
            for _ in range(3):
                async with serving(Supervised(), address):
                    assert await exchanges.exchange(Peer("b", address), MINE) == THEIRS
                    _, stream = exchanges._open["b"]
                assert await stream.code() == grpc.StatusCode.OK  # not cut off when grace ran out
            with pytest.raises(PeerError, match="exchanging facts"):
                await exchanges.exchange(Peer("b", address), MINE)

    asyncio.run(part())


def test_a_peer_that_ends_the_call_after_each_answer() -> None:
    """As daemons did that knew of no streams."""

    async def part() -> None:
        tellings = Tellings()

        async def answer(request: pb.Telling, _: object) -> pb.Telling:
            tellings.take(request)
            return tellings.message("a", THEIRS)

        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(
            answer, pb.Telling.FromString, pb.Telling.SerializeToString
        )
        generic = grpc.method_handlers_generic_handler(NODE_SERVICE, {"Exchange": handler})
        server.add_generic_rpc_handlers((generic,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with asking() as exchanges:
            for _ in range(20):
                assert await exchanges.exchange(Peer("b", f"127.0.0.1:{port}"), MINE) == THEIRS
        await server.stop(None)

    asyncio.run(part())


def test_a_peer_that_does_not_answer_is_given_up() -> None:
    async def part() -> None:
        waits = asyncio.Event()

        async def never(request: bytes, _: object) -> bytes:
            await waits.wait()
            return request

        server = grpc.aio.server()
        handlers: dict[str, Any] = {"Exchange": grpc.unary_unary_rpc_method_handler(never)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(NODE_SERVICE, handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with asking(timeout_s=0.1) as exchanges:
            with pytest.raises(PeerError, match=r"has not answered within 0\.1 s"):
                await exchanges.exchange(Peer("b", f"127.0.0.1:{port}"), MINE)
        await server.stop(None)

    asyncio.run(part())
