"""What any message may say at most; what goes beyond is refused here, by name.

No count, name or number is believed that no cluster has: so what a stranger sends can neither fill
a node's memory nor be told on by it.
"""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache
from typing import Final
from urllib.parse import quote

from snapshotd.coding.digest import content_digest
from snapshotd.core.placement import MAX_GROUP
from snapshotd.errors import RequestError
from snapshotd.wire.address import BadAddress, check_address
from snapshotd.wire.cpus import MAX_CPUS
from snapshotd.wire.protocol import (
    DIGEST_BYTES,
    MAX_EPOCH,
    MAX_IMAGE_BYTES,
    MAX_STEP,
    ErrorCode,
    grain_bytes,
)
from snapshotd.wire.v1 import segment_pb2 as seg

#: More local ranks than any node has GPUs; so that a wild LOCAL_RANK starts nothing.
MAX_SLOTS: Final = 64
#: Ranks of one job: 10,000 nodes of 8, and room to grow.
MAX_WORLD: Final = 1 << 17
#: Nodes that one node may speak of.
MAX_NODES: Final = 1 << 14
#: Members of a group, as placement forms them.
MAX_MEMBERS: Final = MAX_GROUP
#: Generations and parity blocks that one slot may speak of: some dozens are usual.
MAX_HOLDINGS: Final = 1 << 10
#: Node ids, addresses, run ids and the like.
MAX_NAME_BYTES: Final = 255
#: A job's name is the name of a file, %-encoded.
MAX_JOB_BYTES: Final = 200


def check_job(job: str) -> None:
    """Refuse a job name that cannot be the name of its record. Raises RequestError."""
    length = len(quote(job, safe=""))
    if not 1 <= length <= MAX_JOB_BYTES:
        raise RequestError(
            ErrorCode.MALFORMED,
            f"the job's name {job[:40]!r} takes {length} bytes, %-encoded",
            f"Give it a name of 1 to {MAX_JOB_BYTES} bytes",
        )


def check_rank(shard: int, world: int) -> None:
    """Refuse a rank that no job has. Raises RequestError."""
    if not shard < world <= MAX_WORLD:
        raise RequestError(
            ErrorCode.MALFORMED,
            f"rank {shard} of a world of {world}; a world has 1 to {MAX_WORLD} ranks, from 0",
            "Set RANK and WORLD_SIZE (torchrun does), or pass rank and world_size",
        )


def check_slot(slot: int) -> None:
    """Refuse a local rank that no node has. Raises RequestError."""
    if slot >= MAX_SLOTS:
        raise RequestError(
            ErrorCode.MALFORMED,
            f"local rank {slot} is beyond the {MAX_SLOTS} slots of a node",
            f"Set LOCAL_RANK to 0 .. {MAX_SLOTS - 1}",
        )


def check_step(step: int) -> None:
    """Refuse a step that no training reaches. Raises RequestError."""
    if step > MAX_STEP:
        raise RequestError(
            ErrorCode.MALFORMED,
            f"step {step} is beyond {MAX_STEP}",
            "Count steps from 0, in growing order",
        )


def checked_epoch(epoch: int) -> int:
    if epoch > MAX_EPOCH:
        raise malformed(f"epoch {epoch} is beyond {MAX_EPOCH}")
    return epoch


def checked_size(image_bytes: int) -> int:
    if image_bytes > MAX_IMAGE_BYTES:
        raise malformed(f"an image of {image_bytes} bytes, at most {MAX_IMAGE_BYTES} expected")
    return image_bytes


def checked_count(step: int) -> int:
    """A step that a node counted on from one it was told."""
    if step > 2 * MAX_STEP:
        raise malformed(f"step {step} is beyond {2 * MAX_STEP}")
    return step


def check_name(what: str, name: str, shortest: int = 1) -> None:
    """Refuse an empty or an endless name. Raises RequestError."""
    if not shortest <= len(name) <= MAX_NAME_BYTES:
        expected = f"{shortest} to {MAX_NAME_BYTES} expected"
        raise malformed(f"{what} of {len(name)} characters, {expected}")


def check_cpus(cpus: Set[int]) -> None:
    """Refuse more processors than any machine has. Raises RequestError."""
    if len(cpus) > MAX_CPUS:
        raise malformed(f"a trainer on {len(cpus)} processors, at most {MAX_CPUS} expected")


@lru_cache(maxsize=MAX_NODES)
def check_peer_address(address: str) -> None:
    """Refuse what is no host:port: gRPC would dial sockets of other kinds, too."""
    check_name("an address", address)
    try:
        check_address(address)
    except BadAddress as error:
        raise malformed(f"the address {address[:80]!r} cannot be dialled: {error}") from error


def malformed(what: str) -> RequestError:
    """The error for a message whose parts contradict each other."""
    return RequestError(
        ErrorCode.MALFORMED, what, "Use the client or daemon of the same version on both sides"
    )


def check_seal(record: seg.SealRecord) -> None:
    """Refuse a seal record that contradicts itself. Raises RequestError."""
    grains = -(-record.image_bytes // grain_bytes(record.image_bytes))
    if (
        len(record.grain_digests) != grains * DIGEST_BYTES
        or record.content_digest != content_digest(record.grain_digests)
        or record.manifest_bytes > record.image_bytes
        or record.world > MAX_WORLD
    ):
        raise malformed(
            f"the record of shard {record.shard} of job {record.job[:40]!r} contradicts itself: "
            f"{record.world} ranks, {record.image_bytes} bytes, a manifest of "
            f"{record.manifest_bytes}, {len(record.grain_digests)} bytes of digests"
        )


def check_digest(digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise malformed(f"a digest of {len(digest)} bytes where {DIGEST_BYTES} were expected")
