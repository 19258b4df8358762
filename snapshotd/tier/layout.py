"""The names of a job's objects in the persistent tier, and the index that makes a step whole.

::

    URL/JOB/data/EPOCH-STEP/shard-00000.image    the image, as it stood in its segment
    URL/JOB/data/EPOCH-STEP/shard-00000.seal     its SealRecord; written when the image has verified
    URL/JOB/steps/EPOCH-STEP.json                the index; written last: now the step counts

JOB is %-encoded, EPOCH and STEP have leading zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from snapshotd.errors import DamagedBytes
from snapshotd.metadata import StoredStep, Version
from snapshotd.wire.protocol import MAX_EPOCH, MAX_STEP
from snapshotd.wire.v1.segment_pb2 import SealRecord

#: Raised when an older reader would misread it.
INDEX_FORMAT: Final = 1

_NAME: Final = re.compile(r"(\d{16})-(\d{16})(\.json)?$")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the index says of one shard; the digest is in hexadecimal digits."""

    shard: int
    image_bytes: int
    manifest_bytes: int
    content_digest: str


@dataclass(frozen=True, slots=True)
class Index:
    """What a step consists of."""

    job: str
    step: StoredStep
    shards: tuple[ShardEntry, ...]

    def to_bytes(self) -> bytes:
        text = {
            "format": INDEX_FORMAT,
            "job": self.job,
            "epoch": self.step.version.epoch,
            "step": self.step.version.step,
            "world": self.step.world,
            "number": self.step.number,
            "unix_s": self.step.unix_s,
            "shards": [
                {
                    "shard": s.shard,
                    "image_bytes": s.image_bytes,
                    "manifest_bytes": s.manifest_bytes,
                    "content_digest": s.content_digest,
                }
                for s in self.shards
            ],
        }
        return json.dumps(text, indent=1).encode()

    @classmethod
    def from_bytes(cls, text: bytes, where: str) -> Index:
        """Raises DamagedBytes: it is no index of a whole step."""
        try:
            tree: dict[str, Any] = json.loads(text)
            if tree["format"] != INDEX_FORMAT:
                raise DamagedBytes(
                    f"{where} is of format {tree['format']}, this daemon reads {INDEX_FORMAT}"
                )
            step = StoredStep(
                Version(int(tree["epoch"]), int(tree["step"])),
                int(tree["world"]),
                int(tree["number"]),
                float(tree["unix_s"]),
            )
            shards = tuple(ShardEntry(**entry) for entry in tree["shards"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DamagedBytes(f"{where} is no index of a step: {error!r}") from error
        if len(shards) != step.world or [s.shard for s in shards] != list(range(len(shards))):
            raise DamagedBytes(f"{where} does not name each of {step.world} shards once")
        return cls(str(tree["job"]), step, shards)


def index_of(job: str, step: StoredStep, seals: Iterable[SealRecord]) -> Index:
    """The index of a step with these shards, in shard order."""
    entries = (
        ShardEntry(s.shard, s.image_bytes, s.manifest_bytes, s.content_digest.hex()) for s in seals
    )
    return Index(job, step, tuple(entries))


def job_path(root: str, job: str) -> str:
    return f"{root.rstrip('/')}/{quote(job, safe='')}"


def steps_path(job: str) -> str:
    return f"{job}/steps"


def data_path(job: str) -> str:
    return f"{job}/data"


def version_name(version: Version) -> str:
    return f"{version.epoch:016d}-{version.step:016d}"


def index_path(job: str, version: Version) -> str:
    return f"{steps_path(job)}/{version_name(version)}.json"


def image_path(job: str, version: Version, shard: int) -> str:
    return f"{data_path(job)}/{version_name(version)}/shard-{shard:05d}.image"


def seal_path(job: str, version: Version, shard: int) -> str:
    return f"{data_path(job)}/{version_name(version)}/shard-{shard:05d}.seal"


def version_of(path: str) -> Version | None:
    """The version that a path's last part names; None for what is not ours."""
    match = _NAME.fullmatch(path.rstrip("/").rpartition("/")[2])
    if match is None or int(match[1]) > MAX_EPOCH or int(match[2]) > MAX_STEP:
        return None
    return Version(int(match[1]), int(match[2]))
