"""Bits that flip in memory are found by the scrub, and the bytes are rebuilt from the group."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from snapshotd.wire.protocol import HEADER_BYTES
from tests.integration.cluster import Cluster, eventually
from tests.integration.damage import committed_file, flip
from tests.integration.ranks import Job, homes


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
