"""The node service: facts between supervisors, status and plan for operators, health for all."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from snapshotd.core.membership import Refusal
from snapshotd.errors import ConfigError, PeerError, RequestError, SnapshotdError
from snapshotd.metadata import NodeFacts
from snapshotd.rpc.channels import CONTROL_OPTIONS, Channels, NotTrusted, Peer, listen, status_of
from snapshotd.rpc.facts import node_to
from snapshotd.rpc.telling import Tellings, speaker
from snapshotd.rpc.tls import Callers, Identity
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import node_pb2_grpc

log = logging.getLogger(__name__)

NODE_SERVICE = pb.DESCRIPTOR.services_by_name["Node"].full_name

#: Metadata key of a refusal that the caller must not try again.
FATAL_KEY = "snapshotd-fatal"


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

    async def Exchange(  # noqa: N802  # the name in the .proto
        self,
        request: pb.Telling,
        context: grpc.aio.ServicerContext[pb.Telling, pb.Telling],
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
        service = NodeService(supervisor, Callers(identity), tellings)
        node_pb2_grpc.add_NodeServicer_to_server(service, self._server)
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
        await self._server.stop(grace_s)


class RefusedByPeer(PeerError):
    """The peer does not take our facts; `fatal` when it never will."""

    def __init__(self, what: str, *, fatal: bool) -> None:
        super().__init__(what)
        self.fatal = fatal


async def exchange(
    channels: Channels, peer: Peer, facts: NodeFacts, timeout_s: float, tellings: Tellings
) -> NodeFacts:
    """Give a peer our facts and get its own.

    Raises:
        RefusedByPeer: it does not take them. PeerError: it cannot be reached.
    """
    for last in (False, True):
        told = tellings.message(peer.node, facts, whole=last)
        reply = await _exchanged(channels, peer, told, timeout_s)
        try:
            node, theirs = speaker(reply), tellings.take(reply)
        except RequestError as error:
            raise PeerError(f"{peer} sent facts that make no sense: {error.what}") from error
        if channels.authenticated and node != peer.node:
            raise PeerError(f"{peer.node} at {peer} sent facts of {node!r}")
        # Else one of the two was started anew, or messages have overtaken each other.
        if theirs is not None and (last or tellings.has_heard(node, facts)):
            return theirs
    raise PeerError(f"{peer} builds on facts that it was not told")


async def _exchanged(
    channels: Channels, peer: Peer, told: pb.Telling, timeout_s: float
) -> pb.Telling:
    stub = node_pb2_grpc.NodeStub(channels.to(peer))
    try:
        with channels.errors(peer, "exchanging facts"):
            reply: pb.Telling | None = await stub.Exchange(told, timeout=timeout_s)
    except NotTrusted as error:
        raise RefusedByPeer(str(error), fatal=False) from error
    except PeerError as error:
        cause = error.__cause__
        if (
            isinstance(cause, grpc.aio.AioRpcError)
            and cause.code() == grpc.StatusCode.FAILED_PRECONDITION
        ):
            trailing = dict(cause.trailing_metadata() or ())
            fatal = FATAL_KEY in trailing
            raise RefusedByPeer(cause.details() or "refused", fatal=fatal) from error
        raise
    if reply is None:  # what gRPC gives for bytes that are no message
        raise PeerError(f"{peer} sent what is no message of snapshotd")
    return reply
