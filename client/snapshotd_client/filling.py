"""Asks the daemon for bytes of any shard of the restored version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from snapshotd.wire.points import point
from snapshotd.wire.v1 import segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.buffers import Reading
from snapshotd_client.errors import StateMismatch
from snapshotd_client.ranges import Ranges

#: Asks one question and gives the answer; raises as `Channel.ask`.
Ask = Callable[[pb.ToDaemon], pb.ToTrainer]


@dataclass
class Taken:
    """Bytes that were asked for, by where they came from.

    Attributes:
        read: of the shards.
        local: of these, from this slot's own memory.
        copied: ... from others that hold the shard.
        decoded: ... rebuilt from the erasure code.
        stored: ... out of the persistent tier.
        received: from other nodes or the persistent tier, for all of it.
    """

    read: int = 0
    local: int = 0
    copied: int = 0
    decoded: int = 0
    stored: int = 0
    received: int = 0


def manifests(ask: Ask) -> dict[int, segment_pb2.Manifest]:
    """The manifests of all shards, by shard.

    Raises:
        StateMismatch: one cannot be read.
        DaemonGone: as `_lent`.
    """
    gathered = ask(pb.ToDaemon(manifests=pb.Manifests())).manifests_gathered
    point("trainer.manifests.answered")
    found = {}
    with _lent(ask):
        for piece in gathered.pieces:
            with closing(Reading(gathered.path, piece.offset, piece.bytes)) as reading:
                try:
                    found[piece.shard] = segment_pb2.Manifest.FromString(bytes(reading.image))
                except DecodeError as error:
                    raise StateMismatch(
                        [f"the manifest of rank {piece.shard} cannot be read: {error}"]
                    ) from error
    return found


@contextmanager
def filled(ask: Ask, ranges: Ranges, image_bytes: int, taken: Taken) -> Iterator[memoryview]:
    """An image that the daemon has put together; what is written to it stays in this process.

    Args:
        ask: the daemon.
        ranges: what it is made of.
        image_bytes: its length.
        taken: counts on.

    Raises:
        DaemonGone: as `_lent`.
    """
    answer = ask(pb.ToDaemon(fill=ranges.message(image_bytes))).filled
    point("trainer.fill.answered")
    taken.read += ranges.nbytes
    taken.local += answer.bytes_local
    taken.copied += answer.bytes_copied
    taken.decoded += answer.bytes_decoded
    taken.stored += answer.bytes_stored
    taken.received += answer.bytes_received
    with _lent(ask):
        reading = Reading(answer.path, answer.image_offset, image_bytes, private=True)
        with closing(reading):
            yield reading.image


@contextmanager
def _lent(ask: Ask) -> Iterator[None]:
    """While the daemon that lent memory lives, nobody else writes to it; the next one may.

    Raises:
        DaemonGone: it did not live until all was read: what was read counts for nothing, and no
            more what was found wrong with it.
    """
    try:
        yield
    except Exception:
        ask(pb.ToDaemon(query=pb.Query()))
        raise
    ask(pb.ToDaemon(query=pb.Query()))
