"""gRPC channels and servers: their options, and how a failed call becomes a PeerError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import grpc
import grpc.aio

from snapshotd.errors import PeerError
from snapshotd.wire.protocol import MAX_CONTROL_BYTES

#: One attempt to connect: a busy node takes its time.
CONNECT_ATTEMPT_S: Final = 5.0
#: Pauses between attempts. A peer that was away is to be found again within a second of its return.
RECONNECT_FIRST_S: Final = 0.1
RECONNECT_LAST_S: Final = 1.0

#: A port must be ours alone. What gRPC calls the minimum is how long one attempt may take.
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_CONTROL_BYTES),
    ("grpc.max_send_message_length", MAX_CONTROL_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.min_reconnect_backoff_ms", round(CONNECT_ATTEMPT_S * 1000)),
    ("grpc.initial_reconnect_backoff_ms", round(RECONNECT_FIRST_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", round(RECONNECT_LAST_S * 1000)),
    ("grpc.enable_http_proxy", 0),
)


class Channels:
    """One channel for each address, made when first asked for."""

    def __init__(self) -> None:
        self._open: dict[str, grpc.aio.Channel] = {}

    def to(self, address: str) -> grpc.aio.Channel:
        channel = self._open.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=OPTIONS)
            self._open[address] = channel
        return channel

    async def keep_only(self, addresses: set[str]) -> None:
        """Close channels to addresses that nobody has any more."""
        for address in set(self._open) - addresses:
            await self._open.pop(address).close()

    async def close(self) -> None:
        await self.keep_only(set())


@contextmanager
def peer_errors(address: str, what: str) -> Iterator[None]:
    """Turn gRPC's errors into a PeerError that names the peer and what was asked of it."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise PeerError(
            f"{what} at {address} failed: {error.code().name.lower()}: {error.details()}"
        ) from error
