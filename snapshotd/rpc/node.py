"""The node service: facts between supervisors, status and plan for operators, health for all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from snapshotd.core.membership import Refusal
from snapshotd.errors import ConfigError, SnapshotdError
from snapshotd.metadata import NodeFacts
from snapshotd.rpc.channels import CONTROL_OPTIONS, listen, status_of
from snapshotd.rpc.exchange import FATAL_KEY
from snapshotd.rpc.facts import node_to
from snapshotd.rpc.telling import Tellings, speaker
from snapshotd.rpc.tls import Callers, Identity
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import node_pb2_grpc

log = logging.getLogger(__name__)

NODE_SERVICE = pb.DESCRIPTOR.services_by_name["Node"].full_name

#: Of a peer that neither says anything on its stream nor takes an answer; it may open another.
EXCHANGE_SILENCE_S: Final = 60.0


class Supervised(Protocol):
    """What the node service asks of the supervisor."""

    def hear(self, facts: NodeFacts) -> Refusal | None: ...

    def facts(self) -> NodeFacts: ...

    def status(self) -> pb.NodeStatus: ...

    def plan(self, job: str) -> pb.PlanReply: ...

    def drop(self, job: str) -> int: ...


class NodeService(node_pb2_grpc.NodeServicer):
    """Translates calls to the supervisor; refuses what cannot be understood."""

    def __init__(self, supervisor: Supervised, callers: Callers, tellings: Tellings) -> None:
        self._supervisor = supervisor
        self._callers = callers
        self._tellings = tellings
        self._silences: set[asyncio.Timeout] = set()
        self._ended = False

    async def Exchange(  # noqa: N802  # the name in the .proto
        self,
        requests: AsyncIterator[pb.Telling],  # noqa: ARG002  # read by the context
        context: grpc.aio.ServicerContext[pb.Telling, pb.Telling],
    ) -> None:
        with contextlib.suppress(TimeoutError):
            while not self._ended:
                async with asyncio.timeout(EXCHANGE_SILENCE_S) as silence:
                    self._silences.add(silence)
                    try:
                        request: object = await context.read()
                        if not isinstance(request, pb.Telling):
                            return  # the peer has ended it
                        await context.write(await self._exchange(request, context))
                    finally:
                        self._silences.discard(silence)

    async def _exchange(
        self, request: pb.Telling, context: grpc.aio.ServicerContext[pb.Telling, pb.Telling]
    ) -> pb.Telling:
        try:
            node = speaker(request)
            self._callers.check(context, node)
            facts = self._tellings.take(request)
            refusal = self._supervisor.hear(facts) if facts else None
        except SnapshotdError as error:
            await context.abort(*status_of(error))
        if refusal is not None:
            fatal = ((FATAL_KEY, "1"),) if refusal.fatal else ()
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal.reason, fatal)
        return self._tellings.message(node, self._supervisor.facts())

    def end_exchanges(self) -> None:
        """Peers see the streams end that they have opened."""
        self._ended = True
        for silence in self._silences:
            silence.reschedule(asyncio.get_running_loop().time())

    async def Status(  # noqa: N802  # the name in the .proto
        self,
        request: pb.StatusRequest,  # noqa: ARG002  # empty
        context: grpc.aio.ServicerContext[pb.StatusRequest, pb.NodeStatus],
    ) -> pb.NodeStatus:
        await self._check(context)
        return self._supervisor.status()

    async def Inventory(  # noqa: N802  # the name in the .proto
        self,
        request: pb.InventoryRequest,  # noqa: ARG002  # empty
        context: grpc.aio.ServicerContext[pb.InventoryRequest, pb.NodeFacts],
    ) -> pb.NodeFacts:
        await self._check(context)
        return node_to(self._supervisor.facts())

    async def Plan(  # noqa: N802  # the name in the .proto
        self,
        request: pb.PlanRequest,
        context: grpc.aio.ServicerContext[pb.PlanRequest, pb.PlanReply],
    ) -> pb.PlanReply:
        await self._check(context)
        return self._supervisor.plan(request.job)

    async def Drop(  # noqa: N802  # the name in the .proto
        self,
        request: pb.DropRequest,
        context: grpc.aio.ServicerContext[pb.DropRequest, pb.DropReply],
    ) -> pb.DropReply:
        await self._check(context)
        try:
            return pb.DropReply(freed_bytes=self._supervisor.drop(request.job))
        except SnapshotdError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise

    async def _check(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """An operator may be anybody of the cluster."""
        try:
            self._callers.check(context)
        except SnapshotdError as error:
            await context.abort(*status_of(error))


class NodeServer:
    """The gRPC server of a supervisor: node service, health, reflection."""

    def __init__(
        self, supervisor: Supervised, identity: Identity | None, tellings: Tellings
    ) -> None:
        self._identity = identity
        self._server = grpc.aio.server(options=CONTROL_OPTIONS)
        self._health = health.aio.HealthServicer()
        self._service = NodeService(supervisor, Callers(identity), tellings)
        node_pb2_grpc.add_NodeServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (NODE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, address: str) -> None:
        """Bind and serve.

        Raises:
            ConfigError: the address cannot be bound.
        """
        await self.set_health(serving=False)
        try:
            listen(self._server, address, self._identity)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error}",
                "Set `listen` to an address of this node whose port is free",
            ) from error
        await self._server.start()

    async def set_health(self, *, serving: bool) -> None:
        """Answer health checks from now on with SERVING or NOT_SERVING."""
        state = health_pb2.HealthCheckResponse.ServingStatus.Value(
            "SERVING" if serving else "NOT_SERVING"
        )
        for name in ("", NODE_SERVICE):
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        self._service.end_exchanges()
        await self._server.stop(grace_s)
