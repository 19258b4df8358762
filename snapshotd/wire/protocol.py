"""Numbers that both sides of the wire must agree on, and nothing else."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

#: Raised whenever a message or a file changes in a way an older reader would misread.
PROTOCOL_VERSION: Final = 1
SEGMENT_FORMAT: Final = 1
MANIFEST_FORMAT: Final = 3

#: The header page: one page, so that one pwrite replaces it whole.
HEADER_BYTES: Final = 4096

#: Unit of transfer and of coding between nodes. A power of two, a multiple of every grain.
TRANSFER_BYTES: Final = 1 << 20

#: What blocks go over between nodes; every node dials both, and serves one of them.
GRPC: Final = "grpc"
SOCKETS: Final = "sockets"

#: Bounds of a grain, the unit of checksums.
MIN_GRAIN_BYTES: Final = 4 << 10
MAX_GRAIN_BYTES: Final = 1 << 20

DIGEST_BYTES: Final = 16

#: Bound of one control message (facts, orders, trainer messages) on any socket.
MAX_CONTROL_BYTES: Final = 16 << 20

#: Greatest epoch and step that any message may name: far beyond what any job reaches (epochs are
#: seconds of the wall clock), so that what is counted on from them fits every message.
MAX_EPOCH: Final = 1 << 48
MAX_STEP: Final = 1 << 48
#: Longest image that any message may speak of: more than any slot has memory for.
MAX_IMAGE_BYTES: Final = 1 << 44

#: Jobs that one node knows of; the names of those that ended stay known.
MAX_JOBS: Final = 1 << 14

#: Name of the supervisor's socket for trainers, inside the run directory.
FRONT_SOCKET: Final = "trainers.sock"

#: Name of the file in the run directory that tells commands which certificate to show.
TLS_FILE: Final = "tls.json"


def trainer_lock_name(slot: int) -> str:
    """File in the run directory that a living trainer of `slot` holds a POSIX record lock on."""
    return f"trainer-{slot}.lock"


class ErrorCode(StrEnum):
    """Stable names of refusals that a trainer may receive."""

    PROTOCOL_MISMATCH = "protocol-mismatch"
    MALFORMED = "malformed"
    OUT_OF_ORDER = "out-of-order"
    DUPLICATE_RANK = "duplicate-rank"
    WRONG_JOB = "wrong-job"
    NO_ROOM = "no-room"
    STEP_BACKWARDS = "step-backwards"
    LOST = "lost"
    CANNOT_PROTECT = "cannot-protect"
    OTHER_WORLD = "other-world"
    BUSY = "busy"
    INTERNAL = "internal"


def grain_bytes(image_bytes: int) -> int:
    """Length of one checksum grain of an image: a power of two, about 1/256 of the image.

    Depends on nothing but the image's length, so that the digests of a shard stay valid in
    every group it is ever coded in.

    Args:
        image_bytes: length of the whole image, bytes.

    Returns:
        Between MIN_GRAIN_BYTES and MAX_GRAIN_BYTES.
    """
    wanted = max(1, image_bytes // 256)
    power = 1 << (wanted - 1).bit_length()
    return max(MIN_GRAIN_BYTES, min(MAX_GRAIN_BYTES, power))
