"""The link between a supervisor and its SMPs: facts up, orders down, over a unix socket.

The link's breaking off is how each side learns of the other's death: an SMP ends with its
supervisor, a supervisor starts a lost SMP again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from snapshotd.errors import PeerError, SnapshotdError
from snapshotd.metadata import Orders, SlotFacts
from snapshotd.rpc.channels import CONTROL_OPTIONS, peer_errors, status_of
from snapshotd.rpc.checks import malformed
from snapshotd.rpc.facts import slot_from, slot_to
from snapshotd.rpc.memo import OrdersIn
from snapshotd.wire.points import point
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import node_pb2_grpc

_Call = grpc.aio.StreamStreamCall[pb.SlotFacts, pb.Orders]


class Mailbox:
    """Holds the newest message only: facts and orders are whole, so older ones are worthless."""

    def __init__(self) -> None:
        self._newest: pb.Orders | pb.SlotFacts | None = None
        self._filled = asyncio.Event()

    def put(self, message: pb.Orders | pb.SlotFacts) -> None:
        self._newest = message
        self._filled.set()

    async def take(self) -> pb.Orders | pb.SlotFacts:
        await self._filled.wait()
        self._filled.clear()
        assert self._newest is not None
        return self._newest


class SlotSink(Protocol):
    """The supervisor's side of the links."""

    def linked(self, slot: int, outbox: Mailbox) -> None: ...

    def slot_changed(self, facts: SlotFacts) -> None: ...

    def unlinked(self, slot: int, outbox: Mailbox) -> None: ...


class LocalService(node_pb2_grpc.LocalServicer):
    """Serves the SMPs of this node."""

    def __init__(self, sink: SlotSink) -> None:
        self._sink = sink

    async def Link(  # noqa: N802  # the name in the .proto
        self,
        requests: AsyncIterator[pb.SlotFacts],
        context: grpc.aio.ServicerContext[pb.SlotFacts, pb.Orders],
    ) -> AsyncIterator[pb.Orders]:
        outbox = Mailbox()
        reading = asyncio.create_task(self._read(requests, outbox))
        taking = asyncio.create_task(outbox.take())
        try:
            while not reading.done():
                await asyncio.wait({taking, reading}, return_when=asyncio.FIRST_COMPLETED)
                if taking.done():
                    orders = taking.result()
                    assert isinstance(orders, pb.Orders)
                    yield orders
                    taking = asyncio.create_task(outbox.take())
            await reading
        except SnapshotdError as error:
            await context.abort(*status_of(error))
        finally:
            reading.cancel()
            taking.cancel()

    async def _read(self, requests: AsyncIterator[pb.SlotFacts], outbox: Mailbox) -> None:
        slot: int | None = None
        try:
            async for message in requests:
                facts = slot_from(message)
                if slot is None:
                    slot = facts.slot
                    self._sink.linked(slot, outbox)
                elif facts.slot != slot:
                    raise malformed(f"the link of slot {slot} spoke of slot {facts.slot}")
                self._sink.slot_changed(facts)
        finally:
            if slot is not None:
                self._sink.unlinked(slot, outbox)


class LocalServer:
    """The supervisor's unix-socket server."""

    def __init__(self, sink: SlotSink) -> None:
        self._server = grpc.aio.server(options=CONTROL_OPTIONS)
        node_pb2_grpc.add_LocalServicer_to_server(LocalService(sink), self._server)

    async def start(self, socket: Path) -> None:
        self._server.add_insecure_port(f"unix:{socket}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)


class Link:
    """The SMP's side: publish facts, receive orders, end with the supervisor."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=CONTROL_OPTIONS)
        self._address = str(socket)
        self._outbox = Mailbox()

    def publish(self, facts: SlotFacts) -> None:
        self._outbox.put(slot_to(facts))

    async def run(self, on_orders: Callable[[Orders], None]) -> None:
        """Pump both ways until the supervisor is gone.

        Raises:
            PeerError: always, in the end: the link broke off.
        """
        call = node_pb2_grpc.LocalStub(self._channel).Link()
        ways = [
            asyncio.create_task(self._follow(call, on_orders)),
            asyncio.create_task(self._pump(call)),
        ]
        try:
            # With either way broken off the link is of no use any more.
            ended, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
            with peer_errors(self._address, "the link to the supervisor"):
                for way in ended:
                    way.result()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            await self._channel.close()

    async def _follow(self, call: _Call, on_orders: Callable[[Orders], None]) -> None:
        orders = OrdersIn()
        while isinstance(message := await call.read(), pb.Orders):
            on_orders(orders.orders(message))
        raise PeerError("the supervisor ended the link")

    async def _pump(self, call: _Call) -> None:
        while True:
            facts = await self._outbox.take()
            assert isinstance(facts, pb.SlotFacts)
            try:
                await call.write(facts)
            except asyncio.InvalidStateError:
                return  # it is over: the other way says why
            point("smp.facts.sent")
