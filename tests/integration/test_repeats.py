"""A capture that stands still is seen by the daemon, shown to the operator, told to the trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from snapshotd_client.copying import Load, Target
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Job, homes


def freeze(patch: pytest.MonkeyPatch) -> None:
    """The capture of this process copies for ever what it copied first."""
    live = Target.put
    first: dict[tuple[Load, int], torch.Tensor] = {}

    def frozen(target: Target, load: Load, *rest: object) -> None:
        live(target, load, *rest)
        for offset, source in (*load.large, *(piece for batch in load.batches for piece in batch)):
            place = target.image[offset : offset + source.nbytes]
            place.copy_(first.setdefault((load, offset), place.clone()))

    patch.setattr(Target, "put", frozen)


def counters(node: Node) -> tuple[int, int]:
    found = node.status().slots[0].counters
    return found.repeated_now, found.repeated_total


def warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum("very same tensors" in record.getMessage() for record in caplog.records)


def test_a_frozen_capture_raises_the_alarm_and_a_live_one_ends_it(
    cluster: Callable[..., Cluster], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "snapshotd_client")
    nodes = cluster().start(3)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(3)
    assert [counters(node) for node in nodes] == [(0, 0)] * 3
    assert not any(node.status().notes for node in nodes)
    with pytest.MonkeyPatch.context() as patch:
        freeze(patch)
        job.train_protected(4)
    for node, rank in zip(nodes, job.ranks, strict=True):
        assert counters(node) == (3, 3)
        status = node.status()
        assert status.healthy, "an alarm is no error"
        assert "the last 4 snapshots" in status.notes[0]
        assert rank.snap is not None
        assert rank.snap.status().repeated == 3
    assert warnings(caplog) == 3, "once for each rank"
    job.train_protected(2)
    assert [counters(node) for node in nodes] == [(0, 3)] * 3
    assert not any(node.status().notes for node in nodes)
    for node in nodes:
        assert node.tail().count("has the very tensors of the snapshot before") == 1
        assert node.tail().count("changes again, after 3 equal snapshots") == 1
    assert warnings(caplog) == 3
    job.close()
    eventually("the trainers are gone", lambda: not nodes[0].status().slots[0].HasField("trainer"))
