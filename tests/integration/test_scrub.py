"""Bits that flip in memory are found by the scrub, and the bytes are rebuilt from the group."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotd.memory.segment import Segment
from snapshotd.wire.protocol import HEADER_BYTES
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Job, homes, segment_files


def committed_file(node: Node, kind: str) -> Path:
    """The one sealed segment of a kind: after the last commit the other one is free."""
    for path in segment_files(node):
        segment = Segment.open(path)
        sealed = segment.state.name == "SEALED"
        segment.close()
        if sealed and path.name.startswith(kind):
            return path
    raise AssertionError(f"{node.name} holds no sealed {kind}")


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[offset] ^= 0x10


@pytest.mark.parametrize("kind", ["data", "parity"])
def test_a_flipped_bit_is_found_and_mended_while_nobody_restores(
    cluster: Callable[..., Cluster], kind: str
) -> None:
    nodes = cluster().start(4)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(3)
    flip(committed_file(nodes[2], kind), HEADER_BYTES + 5000)
    eventually(
        "the scrub has found it",
        lambda: nodes[2].status().slots[0].counters.quarantined == 1,
    )
    eventually(
        "the group protects everything again",
        lambda: all(node.status().shards[0].is_protected for node in nodes),
    )
    decoded = nodes[2].status().slots[0].counters.bytes_decoded
    assert (decoded > 0) == (kind == "data")
    job.train_protected(2)
    job.vanish()
    job = Job(homes(nodes))
    assert job.restore()[0].step == 4
    job.check()
    job.close()


def test_a_shard_that_rots_between_restore_and_commit_is_rebuilt(
    cluster: Callable[..., Cluster],
) -> None:
    """With two generations the slot has no buffer to go on with until the shard is back."""
    nodes = cluster().start(3)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    job.vanish()
    job = Job(homes(nodes))
    job.restore()
    flip(committed_file(nodes[0], "data"), HEADER_BYTES + 5000)
    eventually(
        "it is found and rebuilt",
        lambda: nodes[0].status().slots[0].counters.bytes_decoded > 0,
    )
    job.train_protected(2)
    job.check()
    job.close()
