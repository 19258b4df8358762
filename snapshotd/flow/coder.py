"""Coding stripes: k blocks gathered, parity rows computed once, kept or handed on.

Blocks of a stripe are read in step, one chunk of TRANSFER_BYTES of each at a time, so a task
holds at most n chunks whatever the size of the state. What trainers still write is followed: it
is coded as it comes, and counts once each of the group has sealed the very bytes that were read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial

from snapshotd.coding.codec import Codec
from snapshotd.coding.digest import chunk_digests
from snapshotd.core.instructions import Encode
from snapshotd.core.protection import data_at
from snapshotd.core.stripes import Extent, Source, block_extent, parity_bytes, stripe
from snapshotd.errors import PeerError
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.lanes import Lane, Peers, all_of, as_told, in_step, opened, peer_at
from snapshotd.flow.vault import Vault
from snapshotd.memory.segment import Segment
from snapshotd.metadata import Group, Home, Member, ParityPlace
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.block_writer import BlockWriter
from snapshotd.rpc.convert import place_to
from snapshotd.rpc.serving import Record, soon
from snapshotd.wire.points import point
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1 import segment_pb2 as seg


class Coder:
    """Carries out what one slot has to code."""

    def __init__(
        self, home: Home, vault: Vault, client: BlocksClient, codec: Codec, conduct: Conduct
    ) -> None:
        self._conduct = conduct
        self._home = home
        self._vault = vault
        self._client = client
        self._codec = codec

    async def encode(self, task: Encode, peers: Callable[[], Peers]) -> None:
        """Gather k blocks, compute the wanted parity rows, keep row 0 and hand on the others.

        What trainers still write is coded as it comes. No row is kept before all have sealed what
        was read of them.

        Args:
            task: what to code.
            peers: gives what every slot says of itself, now.

        Raises:
            PeerError: a source or a holder failed, or gave its image up. DamagedBytes, NoRoom: as
                they say.
        """
        point("smp.encode.begun")
        group, version = task.group, task.version
        layout = stripe(group.size, group.parity, task.stripe)
        places = {r: ParityPlace(group.shards, group.parity, task.stripe, r) for r in task.rows}
        length = parity_bytes(places[task.rows[0]], task.shard_bytes)
        lanes: list[Lane] = []
        writers: dict[int, BlockWriter] = {}
        own: Segment | None = None
        with ExitStack() as cleanup:
            unsealed = cleanup.enter_context(ExitStack())
            for source in layout.sources:
                lanes.append(self._lane(task, source, peers()))
                cleanup.callback(lanes[-1].cancel)
            for row, place in places.items():
                holder = group.members[layout.holders[row]].home
                if holder == self._home:
                    own = await self._vault.begin_parity(task.job, version, place, task.shard_bytes)
                    unsealed.callback(self._vault.give_back, own)
                    continue
                writers[row] = self._client.store(
                    peer_at(self._conduct, peers(), holder),
                    job=task.job,
                    epoch=task.epoch,
                    version=version,
                    place=place,
                    image_bytes=length,
                    shard_bytes=task.shard_bytes,
                )
                cleanup.callback(writers[row].cancel)
            await opened(self._conduct, lanes, writers.values())
            with own.image(length) if own is not None else nullcontext() as image:
                code = partial(self._code, task, lanes, image, writers, length)
                digests = await in_step(code, self._conduct, lanes, writers.values())
            records = await self._records(task, peers, lanes, [s.position for s in layout.sources])
            for node in {lane.node for lane in lanes if lane.node}:
                self._conduct.praise(node)
            point("smp.encode.recorded")
            if own is not None:
                (kept,) = places.keys() - writers.keys()
                await self._vault.seal_parity(own, records, length, digests[kept])
                point("smp.encode.kept")
                # From here on the vault may free it, and another task fill it.
                unsealed.pop_all()
            await all_of(
                *(
                    writer.finish(
                        seg.ParityRecord(
                            place=place_to(places[row]),
                            group=records,
                            image_bytes=length,
                            grain_digests=digests[row],
                        )
                    )
                    for row, writer in writers.items()
                )
            )
            point("smp.encode.acknowledged")

    def _code(
        self,
        task: Encode,
        lanes: Sequence[Lane],
        image: memoryview | None,
        writers: Mapping[int, BlockWriter],
        length: int,
    ) -> dict[int, bytes]:
        """Run the stripe through the code; returns the digests of each row. In a thread.

        Our own row is coded where it stays, in `image`; the others in memory that every chunk uses
        anew.
        """
        digests = dict.fromkeys(task.rows, b"")
        places = {row: memoryview(bytearray(min(length, TRANSFER_BYTES))) for row in writers}
        if image is not None:
            places.update((row, image) for row in task.rows if row not in writers)
        for at in range(0, length, TRANSFER_BYTES):
            count = min(TRANSFER_BYTES, length - at)
            blocks = [lane.take(count) for lane in lanes]
            point("smp.encode.gathered")
            with ExitStack() as views:
                out = {}
                for row, place in places.items():
                    start = 0 if row in writers else at
                    out[row] = views.enter_context(place[start : start + count])
                found = self._code_chunk(task.group, blocks, out, length)
                point("smp.encode.coded")
                for row, digest in found.items():
                    digests[row] += digest
                for row, writer in writers.items():
                    writer.put(out[row])
                    point("smp.encode.forwarded")
        return digests

    def _code_chunk(
        self, group: Group, blocks: Sequence[memoryview], out: Mapping[int, memoryview], length: int
    ) -> dict[int, bytes]:
        """Compute a chunk of parity rows, and their digests while the cache has them."""
        self._codec.encode_into(group.data, group.parity, blocks, tuple(out), tuple(out.values()))
        return {row: chunk_digests(block, length) for row, block in out.items()}

    async def _records(
        self,
        task: Encode,
        peers: Callable[[], Peers],
        lanes: Sequence[Lane],
        positions: Sequence[int],
    ) -> list[seg.SealRecord]:
        """What every member of the group has sealed, once all have.

        Asked for at once, so that holders of other rows do not wait for long.
        """
        readers = {p: lane.reader for p, lane in zip(positions, lanes, strict=True)}
        records: dict[int, seg.SealRecord] = {}

        async def ask(position: int, member: Member) -> None:
            home = member.home
            with self._conduct.blaming(home.node):
                record = await self._record(task, position, readers.get(position), peers())
                told = data_at(peers(), home, task.job, member.shard, task.version)
                records[position] = as_told(record, told, str(home))

        # Twice: who writes may be waited for that long, and who hangs no longer.
        bound_s = 2 * self._client.patience_s
        try:
            async with asyncio.timeout(bound_s):
                await all_of(*(ask(*member) for member in enumerate(task.group.members)))
        except TimeoutError as error:
            raise PeerError(f"not all have sealed it {bound_s} s after it was coded") from error
        return [record for _, record in sorted(records.items())]

    async def _record(
        self, task: Encode, position: int, reader: BlockReader | None, peers: Peers
    ) -> Record:
        """What a member has sealed; `reader`: of what was read of it, if anything was."""
        member = task.group.members[position]
        if reader is not None:
            return await reader.record()
        if member.home != self._home:
            reader = self._follow(task, position, peers, Extent(0, 0))
            try:
                return await reader.record()
            finally:
                reader.cancel()
        with self._vault.following(task.job, task.version, member.shard) as image:
            record = await soon(image.record(), self._client.patience_s)
        if record.image_bytes != task.shard_bytes[position]:
            raise PeerError(f"shard {member.shard} was sealed with another length than was told")
        return record

    def _lane(self, task: Encode, source: Source, peers: Peers) -> Lane:
        home = task.group.members[source.position].home
        size = task.shard_bytes[source.position]
        extent = block_extent(size, task.group.data, source.block)
        if extent.length == 0:
            return Lane(None, 0)
        reader = self._follow(task, source.position, peers, extent)
        return Lane(reader, extent.length, home.node)

    def _follow(self, task: Encode, position: int, peers: Peers, extent: Extent) -> BlockReader:
        member = task.group.members[position]
        return self._client.follow(
            peer_at(self._conduct, peers, member.home),
            task.job,
            task.version,
            member.shard,
            task.shard_bytes[position],
            extent.offset,
            extent.length,
        )
