"""The configuration as a whole: the keys of no section, and the rules between sections.

Every key is held once, here or in `sections`: its type, its default, its bounds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ByteSize, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from snapshotd.config.kinds import Address, Directory, LogFormat, LogLevel, Name, Section
from snapshotd.config.sections import Background, Persist, Protection, Timeouts, Tls


def half_of_memory() -> ByteSize:
    """Half of this machine's physical memory, bytes."""
    return ByteSize(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _same_as_run_dir(data: dict[str, Any]) -> Any:
    # Absent where run_dir itself is wrong, which is the error to report; older pydantic asks still.
    return data.get("run_dir", Path("/"))


class Config(Section):
    """All that one daemon is told. Immutable; made by `snapshotd.config.load`."""

    cluster_id: Name = Field(
        description="the cluster's name; only daemons of one cluster speak to each other"
    )
    node_id: Name = Field(description="this node's name, unique in the cluster")
    listen: Address = Field(description="host:port that peers dial to reach this node")
    run_dir: Directory = Field(
        default=Path("/run/snapshotd"),
        description="trainers' sockets, the daemon's lock and address",
    )
    shm_dir: Directory = Field(
        default=Path("/dev/shm/snapshotd"),  # noqa: S108  a tmpfs is what segments are for
        description="segments; a directory of a tmpfs",
    )
    state_dir: Directory = Field(
        default_factory=_same_as_run_dir,
        description="small durable job records; on a disk, a job that lost all nodes to a power "
        "cut is told that it once had a snapshot (default: run_dir)",
    )
    memory_budget: ByteSize = Field(
        default_factory=half_of_memory,
        gt=0,
        description='bytes of segments on this node, like "400GiB" (default: half of memory)',
    )
    generations: int = Field(
        default=2, ge=2, description="buffers per shard: one committed, the others in progress"
    )
    oom_score_adj: int | None = Field(
        default=None,
        ge=-1000,
        le=1000,
        description="whom the kernel ends first when memory runs out, for the supervisor and its "
        "SMPs: -1000 never, 1000 first; below what it was started with takes CAP_SYS_RESOURCE "
        "(default: left as it is)",
    )
    log_level: LogLevel = Field(default="info", description="least severe record that is written")
    log_format: LogFormat = Field(
        default="text", description="text for people, json for collectors"
    )
    peers: Mapping[Name, Address] = Field(
        default_factory=dict, description="node id to address; seeds, not the whole cluster"
    )
    protection: Protection = Field(default_factory=Protection)
    background: Background = Field(default_factory=Background)
    timeouts: Timeouts = Field(default_factory=Timeouts)
    tls: Tls = Field(default_factory=Tls)
    persist: Persist = Field(default_factory=Persist)

    @field_validator("peers")
    @classmethod
    def _one_address_a_node(
        cls, peers: Mapping[str, str], info: ValidationInfo
    ) -> Mapping[str, str]:
        node_id, listen = info.data.get("node_id"), info.data.get("listen")
        if node_id is None or listen is None:
            return peers
        if not _same_address(peers.get(node_id, listen), listen):
            raise _peers_error(
                f"{node_id} is this node and listens on {listen}, but is listed with "
                f"{peers[node_id]}; the node id may be another node's",
                "this node's own entry to be equal to listen, or absent",
                [f"peers.{node_id}", "node_id", "listen"],
            )
        _check_unshared({**peers, node_id: listen})
        return peers


def _check_unshared(peers: Mapping[str, str]) -> None:
    owner: dict[str, str] = {}
    for node, address in peers.items():
        other = owner.setdefault(address.lower(), node)
        if other != node:
            raise _peers_error(
                f"{other} and {node} have the same address {address}",
                "one address for each node id",
                [f"peers.{other}", f"peers.{node}"],
            )


def _same_address(one: str, other: str) -> bool:
    return one.lower() == other.lower()


def _peers_error(why: str, expected: str, related: list[str]) -> PydanticCustomError:
    return PydanticCustomError(
        "peers", "{why}", {"why": why, "expected": expected, "related": related}
    )
