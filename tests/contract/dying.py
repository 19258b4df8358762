"""A source that sends the record and one chunk, says so, and waits to be killed: `python -m`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1 import node_pb2 as pb
from tests.contract.planes import planes, record_of


async def _serve(name: str, directory: Path) -> None:
    image = bytes(2 * TRANSFER_BYTES)
    sent = asyncio.Event()

    async def script() -> AsyncIterator[bytes]:
        yield pb.ReadReply(seal=record_of(image)).SerializeToString()
        yield pb.ReadReply(chunk=image[:TRANSFER_BYTES]).SerializeToString()
        sent.set()
        await asyncio.Event().wait()

    async with planes(directory)[name].lying(script) as peer:
        print(peer.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2])))
