"""The keys of each section: types, defaults, bounds, and the rules between keys of one section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, ByteSize, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from snapshotd.config.kinds import CodecName, File, PlaneName, Seconds, Section
from snapshotd.wire.cpus import ALL, AUTO, parse_cpus

#: The least bound of bytes a second: with less, too few streams could be served at once.
LEAST_RATE: Final = 16 << 20

#: Below it, a chunk takes so long that the program which writes it is taken for hung.
LEAST_BYTES_A_SECOND: Final = 1 << 20

#: Orders in which bounds of waiting must stand, shortest first.
TIMEOUT_ORDERS: Final = (
    ("heartbeat_s", "suspect_s", "dead_s", "restore_s", "torchrun_s"),
    ("dead_s", "replace_s"),
)


class Protection(Section):
    """How the group's code is cut, and when its absence becomes an operator's business."""

    group_size: int = Field(default=4, ge=2, le=32, description="nodes that protect each other (n)")
    parity: int = Field(
        default=1,
        ge=0,
        description="nodes a group may lose at once (m); 0 keeps snapshots local only",
    )
    coding: CodecName = Field(
        default="auto",
        description="what computes the code: isal (ISA-L), zfec (a tenth of the speed), or auto: "
        "isal where it can be had; the bytes are the same",
    )
    plane: PlaneName = Field(
        default="sockets",
        description="what this node's blocks are dialled over: plain sockets, which cost half as "
        "much, or grpc; nodes with the one and the other work together",
    )
    unprotected_bound_s: Seconds = Field(
        default=60.0, description="unprotected for longer than this, the node reports NOT_SERVING"
    )
    scrub_bytes_per_s: ByteSize = Field(
        default=ByteSize(256 << 20),
        ge=0,
        description="sealed segments are verified in the background at this rate; 0 turns it off",
    )
    max_interval: int = Field(
        default=64,
        ge=1,
        description="the snapshot interval is never widened by more than this factor",
    )

    @field_validator("parity")
    @classmethod
    def _parity_below_group(cls, parity: int, info: ValidationInfo) -> int:
        group_size = info.data.get("group_size")
        if group_size is not None and parity >= group_size:
            raise PydanticCustomError(
                "parity",
                "a group of {size} has no room for {parity} parity blocks",
                {
                    "size": group_size,
                    "parity": parity,
                    "expected": f"0 to {group_size - 1}, as group_size is {group_size}",
                    "related": ["protection.group_size"],
                },
            )
        return parity


def _cpus(text: str) -> str:
    if text not in {AUTO, ALL}:
        try:
            parse_cpus(text)
        except ValueError as error:
            facts = {"why": str(error), "expected": 'auto, all, or a list like "0-3,8"'}
            raise PydanticCustomError("cpus", "{why}", facts) from error
    return text


class Background(Section):
    """How the SMPs, which seal, code and move state, stand back behind training."""

    nice: int = Field(
        default=5, ge=0, le=19, description="niceness of the SMPs above the supervisor's; I/O too"
    )
    cpus: Annotated[str, AfterValidator(_cpus)] = Field(
        default=AUTO,
        description='processors the SMPs use: a list like "0-3,8", all, or auto: those of its '
        "trainer's NUMA nodes that the trainer is not pinned to",
    )
    bytes_per_s: ByteSize = Field(
        default=ByteSize(0),
        ge=0,
        description="bytes of blocks that each SMP sends in a second, at most; 0: as many as go; "
        "for a rebuild, too",
    )

    @field_validator("bytes_per_s")
    @classmethod
    def _not_too_slow(cls, bytes_per_s: ByteSize) -> ByteSize:
        if bytes_per_s == 0 or bytes_per_s >= LEAST_RATE:
            return bytes_per_s
        raise PydanticCustomError(
            "bytes_per_s",
            "too few blocks could be sent at once without being taken for stalled",
            {"expected": "0 for no bound, or at least 16MiB"},
        )


class Timeouts(Section):
    """Bounds of waiting; each must be longer than the one it contains."""

    heartbeat_s: Seconds = Field(
        default=1.0, description="a daemon tells its peers its facts this often"
    )
    suspect_s: Seconds = Field(default=3.0, description="silent for this long, a peer is suspected")
    dead_s: Seconds = Field(default=8.0, description="silent for this long, a peer counts as lost")
    replace_s: Seconds = Field(
        default=60.0,
        description="a lost node without a replacement for this long: its state is rebuilt on the "
        "nodes that remain, with the group shrunk",
    )
    restore_s: Seconds = Field(
        default=120.0, description="a restore() is answered within this bound"
    )
    torchrun_s: Seconds = Field(
        default=600.0,
        description="shortest patience of the launcher (torchrun's rendezvous waits 600 s); "
        "snapshotd does not set it, it stays below it",
    )
    rpc_s: Seconds = Field(
        default=10.0,
        description="one control call to a peer is given up after this, and a block that does not "
        "move; at most half of restore_s",
    )

    @field_validator(*{name for order in TIMEOUT_ORDERS for name in order[1:]})
    @classmethod
    def _in_order(cls, value: float, info: ValidationInfo) -> float:
        name = str(info.field_name)
        order = next(o for o in TIMEOUT_ORDERS if name in o[1:])
        below = order[order.index(name) - 1]
        bound = info.data.get(below)
        if bound is not None and value <= bound:
            raise PydanticCustomError(
                "order",
                "it is not longer than {below}, {bound}",
                {
                    "below": below,
                    "bound": bound,
                    "expected": "the order " + " < ".join(order),
                    "related": [f"timeouts.{below}"],
                },
            )
        return value

    @field_validator("rpc_s")
    @classmethod
    def _call_within_a_restore(cls, value: float, info: ValidationInfo) -> float:
        """A peer that hangs must be found out while a restore still waits for absent nodes."""
        heartbeat_s, restore_s = info.data.get("heartbeat_s"), info.data.get("restore_s")
        if heartbeat_s is None or restore_s is None or heartbeat_s < value <= restore_s / 2:
            return value
        raise PydanticCustomError(
            "order",
            "it is not between heartbeat_s, {heartbeat_s}, and half of restore_s, {restore_s}",
            {
                "heartbeat_s": heartbeat_s,
                "restore_s": restore_s,
                "expected": "heartbeat_s < rpc_s <= restore_s / 2",
                "related": ["timeouts.heartbeat_s", "timeouts.restore_s"],
            },
        )


class Persist(Section):
    """The persistent tier: whole steps at an fsspec URL, written in the background."""

    url: str = Field(
        default="",
        max_length=1024,
        description="where committed snapshots are written: an absolute directory, "
        "s3://BUCKET/PATH, gs://..., or what else fsspec knows; the same on all nodes; empty: "
        "nowhere",
    )
    interval_s: float = Field(
        default=600.0,
        ge=0,
        allow_inf_nan=False,
        description="a step is written so long after the last one; 0: only every_steps counts",
    )
    every_steps: int = Field(
        default=0, ge=0, description="a step is written so many steps after the last one; 0: never"
    )
    keep_last: int = Field(
        default=2, ge=1, description="the newest whole steps that are kept there"
    )
    keep_every_nth: int = Field(
        default=0, ge=0, description="of all steps written, each nth is kept for good; 0: none"
    )
    bytes_per_s: ByteSize = Field(
        default=ByteSize(512 << 20),
        ge=0,
        description="bound of what this node writes, and of what it reads back; 0: none",
    )

    @field_validator("url")
    @classmethod
    def _somewhere(cls, url: str) -> str:
        if url and "://" not in url and not Path(url).is_absolute():
            expected = "an absolute directory, or a URL like s3://bucket/path"
            raise PydanticCustomError("url", "it is a relative path", {"expected": expected})
        if url.startswith("memory:"):
            expected = "a place that outlives the daemon"
            raise PydanticCustomError("url", "it is one process's memory", {"expected": expected})
        return url

    @field_validator("every_steps")
    @classmethod
    def _sometimes(cls, every_steps: int, info: ValidationInfo) -> int:
        if not every_steps and info.data.get("interval_s") == 0:
            facts = {"expected": "interval_s or every_steps", "related": ["persist.interval_s"]}
            raise PydanticCustomError("schedule", "nothing would ever be written", facts)
        return every_steps

    @field_validator("bytes_per_s")
    @classmethod
    def _not_too_slow(cls, rate: ByteSize) -> ByteSize:
        if 0 < rate < LEAST_BYTES_A_SECOND:
            facts = {"expected": f"0, or {LEAST_BYTES_A_SECOND} at least"}
            raise PydanticCustomError("rate", "it is so slow that it looks like a hang", facts)
        return rate


class Tls(Section):
    """Certificates by which daemons and operators know each other; all three files, or none."""

    ca: File | None = Field(
        default=None, description="PEM file of the CA that signs the cluster's certificates"
    )
    cert: File | None = Field(
        default=None,
        description="PEM file of this node's certificate; its subjectAltName has DNS:CLUSTER_ID "
        "and DNS:NODE_ID.CLUSTER_ID",
    )
    key: File | None = Field(default=None, description="PEM file of its key, not encrypted")

    @field_validator("key")
    @classmethod
    def _all_or_none(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        given = {"tls.ca": info.data.get("ca"), "tls.cert": info.data.get("cert"), "tls.key": key}
        absent = [name for name, path in given.items() if path is None]
        if not absent or len(absent) == len(given):
            return key
        raise PydanticCustomError(
            "tls",
            "without {absent}, the rest of [tls] is of no use",
            {
                "absent": " and ".join(absent),
                "expected": "all of tls.ca, tls.cert and tls.key, or none of them",
                "related": [name for name in given if name not in absent],
            },
        )
