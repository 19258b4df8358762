"""A whole shard out of another process's memory, for an operator's command; blocking."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

from snapshotd.metadata import Home, Version
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.channels import Peer
from snapshotd.rpc.socket_client import PlanesClient
from snapshotd.rpc.tls import Identity
from snapshotd.wire.v1 import segment_pb2 as seg

#: Who stores blocks says so; this side only reads.
_NOBODY: Final = Home("", 0)


def fetch_image(
    cluster_id: str,
    peer: Peer,
    job: str,
    version: Version,
    shard: int,
    image_bytes: int,
    stall_s: float,
    identity: Identity | None = None,
) -> Iterator[seg.SealRecord | memoryview]:
    """A shard from an SMP: its record, then chunks, each verified, and good until the next one.

    Raises:
        PeerError: it does not answer, has it no more, or sends other bytes.
    """
    with asyncio.Runner() as runner:
        client = PlanesClient(identity, cluster_id, _NOBODY, stall_s, _count, _count)

        async def opened() -> BlockReader:
            return client.read(peer, job, version, shard, 0, image_bytes)

        reader = runner.run(opened())
        try:
            record = runner.run(reader.record())
            assert isinstance(record, seg.SealRecord), "asked for a shard"
            yield record
            at = 0
            while at < image_bytes:
                chunk = runner.run(reader.chunk())
                at += len(chunk)
                yield chunk
        finally:
            reader.cancel()
            runner.run(client.close())


def _count(_nbytes: int) -> None:
    pass
