"""Bringing shards back: copy one, decode a lost one. Executes core's plans.

Blocks of a stripe are read in step, one chunk of TRANSFER_BYTES of each at a time, so a task
holds at most n chunks whatever the size of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from snapshotd.coding.codec import Codec
from snapshotd.coding.digest import check_range
from snapshotd.core.recovery import BlockInput, BlockPlan, Copy, Decode
from snapshotd.core.trust import Misdeed
from snapshotd.errors import DamagedBytes, Misbehaved
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.lanes import Lane, Peers, as_told, in_step, opened, peer_at
from snapshotd.flow.vault import Vault
from snapshotd.memory.segment import Segment
from snapshotd.metadata import DataHolding, Home, Version
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.serving import Record, What
from snapshotd.rpc.streaming import streamed
from snapshotd.wire.points import point
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1 import segment_pb2 as seg


class Transfers:
    """Carries out copies and decodes for one slot."""

    def __init__(
        self, home: Home, vault: Vault, client: BlocksClient, codec: Codec, conduct: Conduct
    ) -> None:
        self._conduct = conduct
        self._home = home
        self._vault = vault
        self._client = client
        self._codec = codec

    async def _record(
        self, peers: Peers, home: Home, job: str, version: Version, what: What
    ) -> Record:
        with self._conduct.blaming(home.node):
            return await self._client.record(
                peer_at(self._conduct, peers, home), job, version, what
            )

    async def copy(self, plan: Copy, peers: Peers) -> DataHolding:
        """Bring a whole shard over from another slot, verified chunk by chunk."""
        held = plan.holding
        peer = peer_at(self._conduct, peers, plan.home)
        reader = self._client.read(peer, held.job, held.version, held.shard, 0, held.image_bytes)
        try:
            with self._conduct.blaming(plan.home.node):
                record = as_told(await reader.record(), held, str(peer))
            segment = await self._vault.begin_data(
                held.job, held.shard, held.version, held.image_bytes
            )
            with ExitStack() as cleanup:
                cleanup.callback(self._vault.give_back, segment)
                point("smp.copy.begun")
                with segment.image(held.image_bytes) as image:
                    copy = partial(self._copy, reader, image)
                    with self._conduct.blaming(plan.home.node):
                        await streamed(copy, reader.abort)
                # Each grain was held against the record, where it stands now.
                holding = await self._sealed_as(segment, record, record.grain_digests)
            self._conduct.praise(plan.home.node)
        finally:
            reader.cancel()
        self._vault.copied_bytes += record.image_bytes
        return holding

    def _copy(self, reader: BlockReader, image: memoryview) -> None:
        """All of an image, chunk by chunk into its place. In a thread."""
        for at in range(0, len(image), TRANSFER_BYTES):
            with image[at : at + TRANSFER_BYTES] as place:
                reader.take(place)
            point("smp.copy.chunk")

    async def decode(self, plan: Decode, peers: Peers) -> DataHolding:
        """Rebuild a lost shard block by block; the result must be what its trainer sealed."""
        record = await self._record_of(plan, peers)
        segment = await self._vault.begin_data(plan.job, plan.shard, plan.version, plan.image_bytes)
        with ExitStack() as cleanup:
            cleanup.callback(self._vault.give_back, segment)
            point("smp.decode.begun")
            digests = b""
            with segment.image(plan.image_bytes) as image:
                for block in plan.blocks:
                    digests += await self._decode_block(plan, block, peers, image, record)
                    point("smp.decode.block")
            holding = await self._sealed_as(segment, record, digests)
        # Only now is it known that all of them told the truth.
        for node in {i.home.node for b in plan.blocks for i in b.inputs if i.home}:
            self._conduct.praise(node)
        self._vault.decoded_bytes += plan.image_bytes
        return holding

    async def _record_of(self, plan: Decode, peers: Peers) -> seg.SealRecord:
        """The lost shard's own record, kept beside every parity block of its group."""
        if plan.record_at == self._home:
            parity = self._vault.segment(plan.job, plan.version, plan.record_place).record
        else:
            parity = await self._record(
                peers, plan.record_at, plan.job, plan.version, plan.record_place
            )
        wanted = plan.shard, plan.content_digest, plan.image_bytes
        for record in parity.group if isinstance(parity, seg.ParityRecord) else ():
            if (record.shard, record.content_digest, record.image_bytes) == wanted:
                return record
        with self._conduct.blaming(plan.record_at.node):
            raise Misbehaved(
                Misdeed.WRONG_RECORD, f"{plan.record_at} has no record of shard {plan.shard}"
            )

    async def _decode_block(
        self,
        plan: Decode,
        block: BlockPlan,
        peers: Peers,
        image: memoryview,
        record: seg.SealRecord,
    ) -> bytes:
        """Rebuild one block in its place; returns the digests of its grains."""
        length = block.extent.length
        with ExitStack() as cleanup:
            lanes: dict[int, Lane] = {}
            for wanted in block.inputs:
                lane = self._input(plan.job, plan.version, wanted, length, peers)
                lanes[wanted.index] = lane
                cleanup.callback(lane.cancel)
            await opened(self._conduct, lanes.values())
            with image[block.extent.offset : block.extent.offset + length] as place:
                solve = partial(self._solve, plan, block, lanes, place, record)
                try:
                    return await in_step(solve, self._conduct, list(lanes.values()))
                except DamagedBytes as error:
                    self._blame_parity(block)
                    raise DamagedBytes(f"decoded wrongly: {error.what}") from error

    def _solve(
        self,
        plan: Decode,
        block: BlockPlan,
        lanes: Mapping[int, Lane],
        place: memoryview,
        record: seg.SealRecord,
    ) -> bytes:
        """Decode a block, chunk by chunk into its place; returns its digests. In a thread.

        Raises:
            DamagedBytes: it is not what was sealed.
        """
        digests = b""
        for at in range(0, len(place), TRANSFER_BYTES):
            with place[at : at + TRANSFER_BYTES] as data:
                have = {index: lane.take(len(data)) for index, lane in lanes.items()}
                self._codec.decode_into(plan.data, plan.parity, have, [block.index], [data])
                start = block.extent.offset + at
                digests += check_range(data, start, record.image_bytes, record.grain_digests)
            point("smp.decode.chunk")
        return digests

    def _blame_parity(self, block: BlockPlan) -> None:
        """Each data block was what its own record says; so wrong bytes come from parity."""
        for wanted in block.inputs:
            if wanted.place is not None and wanted.home is not None:
                what = f"{wanted.home} served parity that is not the code of its group"
                self._conduct.strike(wanted.home.node, Misdeed.WRONG_STRIPE, what)

    def _input(
        self, job: str, version: Version, wanted: BlockInput, length: int, peers: Peers
    ) -> Lane:
        """A lane over as much of an input as the lost block is long, in whole chunks."""
        chunks = -(-length // TRANSFER_BYTES)
        count = min(wanted.extent.length, chunks * TRANSFER_BYTES)
        if wanted.home is None or count == 0:
            return Lane(None, 0)
        what: What | None = wanted.place if wanted.place is not None else wanted.shard
        assert what is not None, "an input is a shard's block or a parity block"
        peer = peer_at(self._conduct, peers, wanted.home)
        reader = self._client.read(peer, job, version, what, wanted.extent.offset, count)
        return Lane(reader, count, wanted.home.node)

    async def _sealed_as(
        self, segment: Segment, record: seg.SealRecord, digests: bytes
    ) -> DataHolding:
        """Seal, and let it count only if it is byte for byte what the record names.

        `digests` of the image's grains were taken there as they came in.
        """
        holding = await self._vault.seal_data(
            segment, record.world, record.image_bytes, record.manifest_bytes, digests
        )
        point("smp.fetch.sealed")
        if holding.content_digest != record.content_digest:
            raise DamagedBytes(
                f"shard {record.shard} came out with digest {holding.content_digest.hex()}, "
                f"its trainer sealed {record.content_digest.hex()}"
            )
        self._vault.enter(segment)
        point("smp.fetch.entered")
        return holding
