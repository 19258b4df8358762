"""The asking side of the exchange of facts: one open stream to each peer, a question at a time.

To open a call and to end it costs gRPC several times what a message on it does.
"""

from __future__ import annotations

import asyncio
import contextlib
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


class _Broken(PeerError):
    """The stream is over, and nothing was said on it of what is wrong with the question."""


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
        kept = self._kept(peer)
        if kept is not None:
            with contextlib.suppress(_Broken):  # what is told may be told again
                return await self._asked(peer, kept, told)
        stream = node_pb2_grpc.NodeStub(self._channels.to(peer)).Exchange()
        self._open[peer.node] = peer, stream
        return await self._asked(peer, stream, told)

    def _kept(self, peer: Peer) -> _Stream | None:
        """The stream to a peer, unless it has ended."""
        whose, stream = self._open.get(peer.node, (None, None))
        if stream is None or (whose == peer and not stream.done()):
            return stream
        self.leave(peer.node)
        return None

    async def _asked(self, peer: Peer, stream: _Stream, told: pb.Telling) -> pb.Telling:
        reply: object = None
        try:
            with self._channels.errors(peer, "exchanging facts"):
                async with asyncio.timeout(self._timeout_s):
                    await stream.write(told)
                    reply = await stream.read()
        except TimeoutError as error:
            raise PeerError(f"{peer} has not answered within {self._timeout_s:g} s") from error
        except NotTrusted as error:
            raise RefusedByPeer(str(error), fatal=False) from error
        except PeerError as error:
            raise _meaning(error) from error.__cause__
        finally:
            if not isinstance(reply, pb.Telling):
                self.leave(peer.node)
        if reply is grpc.aio.EOF:
            raise _Broken(f"{peer} has ended the exchange of facts")
        if not isinstance(reply, pb.Telling):  # what gRPC gives for bytes that are no message
            raise PeerError(f"{peer} sent what is no message of snapshotd")
        return reply


def _meaning(error: PeerError) -> PeerError:
    """A refusal, or a stream that is over."""
    cause = error.__cause__
    if not isinstance(cause, grpc.aio.AioRpcError):
        return error
    if cause.code() == grpc.StatusCode.FAILED_PRECONDITION:
        fatal = FATAL_KEY in dict(cause.trailing_metadata() or ())
        return RefusedByPeer(cause.details() or "refused", fatal=fatal)
    return _Broken(str(error))
