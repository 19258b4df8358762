"""The asking side of the exchange of facts: one open stream to each peer, a question at a time.

To open a call and to end it costs gRPC several times what a message on it does.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from snapshotd.errors import PeerError, RequestError
from snapshotd.metadata import NodeFacts
from snapshotd.rpc.channels import Channels, NotTrusted, Peer
from snapshotd.rpc.telling import Tellings, speaker
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import node_pb2_grpc

#: Metadata key of a refusal that the caller must not try again.
FATAL_KEY = "snapshotd-fatal"

_Stream = Any  # grpc.aio.StreamStreamCall[pb.Telling, pb.Telling], as its stub has it


class RefusedByPeer(PeerError):
    """The peer does not take our facts; `fatal` when it never will."""

    def __init__(self, what: str, *, fatal: bool) -> None:
        super().__init__(what)
        self.fatal = fatal


class Exchanges:
    """Goes to peers with this node's facts; to each peer with one question at a time."""

    def __init__(self, channels: Channels, tellings: Tellings, timeout_s: float) -> None:
        """An answer may take `timeout_s`."""
        self._channels = channels
        self._tellings = tellings
        self._timeout_s = timeout_s
        self._open: dict[str, tuple[Peer, _Stream]] = {}

    async def exchange(self, peer: Peer, facts: NodeFacts) -> NodeFacts:
        """Give a peer our facts and get its own.

        Raises:
            RefusedByPeer: it does not take them. PeerError: it cannot be reached.
        """
        for last in (False, True):
            told = self._tellings.message(peer.node, facts, whole=last)
            reply = await self._answer(peer, told)
            try:
                node, theirs = speaker(reply), self._tellings.take(reply)
            except RequestError as error:
                raise PeerError(f"{peer} sent facts that make no sense: {error.what}") from error
            if self._channels.authenticated and node != peer.node:
                raise PeerError(f"{peer.node} at {peer} sent facts of {node!r}")
            # Else one of the two was started anew, or messages have overtaken each other.
            if theirs is not None and (last or self._tellings.has_heard(node, facts)):
                return theirs
        raise PeerError(f"{peer} builds on facts that it was not told")

    def leave(self, node: str) -> None:
        """End the stream to a peer, if there is one."""
        _, stream = self._open.pop(node, (None, None))
        if stream is not None:
            stream.cancel()

    async def close(self) -> None:
        for node in [*self._open]:
            self.leave(node)
        await self._channels.close()

    async def _answer(self, peer: Peer, told: pb.Telling) -> pb.Telling:
        answered = False
        try:
            stream, fresh = self._stream(peer)
            reply = await self._asked(peer, stream, told)
            if reply is grpc.aio.EOF and not fresh:  # it had ended it just then
                self.leave(peer.node)
                reply = await self._asked(peer, self._stream(peer)[0], told)
            answered = isinstance(reply, pb.Telling)
        finally:
            if not answered:
                self.leave(peer.node)
        if not isinstance(reply, pb.Telling):  # what gRPC gives for bytes that are no message
            raise PeerError(f"{peer} sent what is no message of snapshotd")
        return reply

    def _stream(self, peer: Peer) -> tuple[_Stream, bool]:
        """The stream to a peer, and whether it is a fresh one."""
        whose, stream = self._open.get(peer.node, (None, None))
        if stream is not None and whose == peer and not stream.done():
            return stream, False
        self.leave(peer.node)
        stream = node_pb2_grpc.NodeStub(self._channels.to(peer)).Exchange()
        self._open[peer.node] = peer, stream
        return stream, True

    async def _asked(self, peer: Peer, stream: _Stream, told: pb.Telling) -> object:
        try:
            with self._channels.errors(peer, "exchanging facts"):
                async with asyncio.timeout(self._timeout_s):
                    await stream.write(told)
                    return await stream.read()
        except TimeoutError as error:
            raise PeerError(f"{peer} has not answered within {self._timeout_s:g} s") from error
        except NotTrusted as error:
            raise RefusedByPeer(str(error), fatal=False) from error
        except PeerError as error:
            cause = error.__cause__
            if (
                isinstance(cause, grpc.aio.AioRpcError)
                and cause.code() == grpc.StatusCode.FAILED_PRECONDITION
            ):
                fatal = FATAL_KEY in dict(cause.trailing_metadata() or ())
                raise RefusedByPeer(cause.details() or "refused", fatal=fatal) from error
            raise
