"""Connections of the plane of plain sockets to other slots: dialled, and used again."""

from __future__ import annotations

import asyncio
import socket
import ssl
from functools import partial
from typing import Final

from snapshotd.errors import PeerError
from snapshotd.rpc.channels import CONNECT_ATTEMPT_S, NotTrusted, Peer
from snapshotd.rpc.connection import Connection, Stalled
from snapshotd.rpc.streaming import streamed
from snapshotd.rpc.tls import Identity, check_dialled, shake_meaning

#: Connections that are kept for streams to come; of more, those that waited longest are closed.
MAX_IDLE: Final = 64


class Sockets:
    """A connection carries one stream after the other; each stream has one for itself."""

    def __init__(self, identity: Identity | None) -> None:
        """Dial without TLS where there is no identity to show."""
        self._identity = identity
        self._idle: list[tuple[Peer, Connection]] = []

    async def lease(self, peer: Peer, stall_s: float) -> Connection:
        """A connection to a peer, that it has proved to be where there is TLS.

        Raises:
            PeerError: there is none to be had. NotTrusted: it is another, or takes us for one.
        """
        for index, (whose, connection) in enumerate(self._idle):
            if whose == peer:
                del self._idle[index]
                if connection.is_idle():
                    return connection
                connection.close()
                break
        try:
            async with asyncio.timeout(CONNECT_ATTEMPT_S):
                connection = Connection(await _connected(peer.address), stall_s)
        except (OSError, TimeoutError) as error:
            raise PeerError(f"{peer} cannot be reached: {error or 'it does not answer'}") from error
        try:
            await self._prove(peer, connection)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _prove(self, peer: Peer, connection: Connection) -> None:
        if self._identity is None:
            return
        shake = partial(connection.secure, self._identity.dialling, server_side=False)
        try:
            await streamed(shake, connection.abort)
        except (ssl.SSLError, ConnectionError) as error:
            wrong: str | None = shake_meaning(error)
        except (OSError, Stalled) as error:
            raise PeerError(f"{peer} broke off its handshake: {error or 'silence'}") from error
        else:
            wrong = check_dialled(connection.names, self._identity.name_of(peer.node))
        if wrong:
            raise NotTrusted(f"{peer.node} at {peer.address}: {wrong}")

    def give_back(self, peer: Peer, connection: Connection) -> None:
        """A stream is over; `connection` has nothing of it left to come."""
        idle = [*self._idle, (peer, connection)]
        self._idle = [entry for entry in idle if entry[1].is_idle()][-MAX_IDLE:]
        for entry in idle:
            if entry not in self._idle:
                entry[1].close()

    def close(self) -> None:
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()


async def _connected(address: str) -> socket.socket:
    """Raises OSError: nobody listens there, or it has no such name."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _, where in found:
        dialling = socket.socket(family, kind, protocol)
        try:
            dialling.setblocking(False)
            await loop.sock_connect(dialling, where)
        except OSError as error:
            dialling.close()
            failure = error
        except BaseException:
            dialling.close()
            raise
        else:
            return dialling
    raise failure
