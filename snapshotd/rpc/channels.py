"""gRPC channels and servers: their options, and how errors become statuses and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import grpc
import grpc.aio

from snapshotd.core.trust import Misdeed
from snapshotd.errors import (
    DamagedBytes,
    Misbehaved,
    NoRoom,
    PeerError,
    RequestError,
    SnapshotdError,
)
from snapshotd.rpc.tls import Identity, meaning
from snapshotd.wire.protocol import GRPC, MAX_CONTROL_BYTES

log = logging.getLogger(__name__)

#: One attempt to connect: a busy node takes its time.
CONNECT_ATTEMPT_S: Final = 5.0
#: Pauses between attempts. A peer that was away is to be found again within a second of its return.
RECONNECT_FIRST_S: Final = 0.1
RECONNECT_LAST_S: Final = 1.0

Options = tuple[tuple[str, int | str], ...]

#: A port must be ours alone. What gRPC calls the minimum is how long one attempt may take.
OPTIONS: Options = (
    ("grpc.max_receive_message_length", MAX_CONTROL_BYTES),
    ("grpc.max_send_message_length", MAX_CONTROL_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.min_reconnect_backoff_ms", round(CONNECT_ATTEMPT_S * 1000)),
    ("grpc.initial_reconnect_backoff_ms", round(RECONNECT_FIRST_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", round(RECONNECT_LAST_S * 1000)),
    ("grpc.enable_http_proxy", 0),
)

#: Where messages are few and small. To find out how much a connection could carry, gRPC sends pings
#: beside them, which wake both ends more often than the messages do.
CONTROL_OPTIONS: Options = (*OPTIONS, ("grpc.http2.bdp_probe", 0))


class Peer(NamedTuple):
    """Whom to dial: the node that is meant, where, and over which plane."""

    node: str
    address: str
    plane: str = GRPC

    def __str__(self) -> str:
        return self.address


class NotTrusted(PeerError):
    """One end of a connection does not take the other for what it has to be."""


class Channels:
    """One channel for each peer, made when first asked for."""

    def __init__(self, identity: Identity | None, options: Options = OPTIONS) -> None:
        """Dial without TLS where there is no identity to show."""
        self._identity = identity
        self._options = options
        self._open: dict[Peer, grpc.aio.Channel] = {}

    @property
    def authenticated(self) -> bool:
        """Whether the other ends have proved who they are."""
        return self._identity is not None

    def to(self, peer: Peer) -> grpc.aio.Channel:
        channel = self._open.get(peer)
        if channel is None:
            channel = self._open[peer] = self._dial(peer)
        return channel

    def _dial(self, peer: Peer) -> grpc.aio.Channel:
        if self._identity is None:
            return grpc.aio.insecure_channel(peer.address, options=self._options)
        name = self._identity.name_of(peer.node)
        return grpc.aio.secure_channel(
            peer.address, self._identity.channel(), options=(*self._options, named(name))
        )

    @contextmanager
    def errors(self, peer: Peer, what: str) -> Iterator[None]:
        """As `peer_errors`; NotTrusted where it is for who the peer, or this node, is."""
        try:
            with peer_errors(peer.address, what):
                yield
        except PeerError as error:
            cause = error.__cause__
            name = self._identity.name_of(peer.node) if self._identity else None
            if isinstance(cause, grpc.aio.AioRpcError):
                means = meaning(cause.details() or "", name)
                if means:
                    raise NotTrusted(f"{peer.node} at {peer.address}: {means}") from cause
            raise

    async def close(self) -> None:
        for channel in self._open.values():
            await channel.close()
        self._open.clear()


def named(name: str) -> tuple[str, str]:
    """The option of a channel whose other end must show a certificate of `name`."""
    return ("grpc.ssl_target_name_override", name)


def listen(server: grpc.aio.Server, address: str, identity: Identity | None) -> int:
    """Open a TCP port; returns it. Raises RuntimeError where it cannot be bound."""
    if identity is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, identity.server())


@contextmanager
def peer_errors(address: str, what: str) -> Iterator[None]:
    """Turn gRPC's errors into a PeerError that names the peer and what was asked of it."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise PeerError(
            f"{what} at {address} failed: {error.code().name.lower()}: {error.details()}"
        ) from error


def status_of(error: SnapshotdError) -> tuple[grpc.StatusCode, str]:
    """The gRPC status of an error of ours, for the peer that it is told."""
    code = grpc.StatusCode.UNAVAILABLE
    if isinstance(error, RequestError) or (
        isinstance(error, Misbehaved) and error.misdeed != Misdeed.STALLED
    ):
        code = grpc.StatusCode.FAILED_PRECONDITION
    elif isinstance(error, NoRoom):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
    elif isinstance(error, DamagedBytes):
        code = grpc.StatusCode.DATA_LOSS
    # What is given up, or not there yet, is refused in the usual course, and tried again.
    usual = isinstance(error, PeerError) and not isinstance(error, Misbehaved)
    log.log(logging.INFO if usual else logging.WARNING, "refused a peer: %s", error)
    return code, str(error)
