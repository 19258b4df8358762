"""A daemon that is SIGKILLed while it seals, codes, stores or commits costs no committed byte."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotd_client import ProtectionTimeout
from tests.integration.cluster import Cluster, eventually
from tests.integration.ranks import Job, homes

FAULTS = Path(__file__).parent / "faults"
EITHER = ("before", "after")

#: module:function of the boundary, by what the daemon is doing there.
sealing = [
    "snapshotd.memory.segment:Segment.seal_data",
    "snapshotd.memory.segment:Segment._replace_header",
    "snapshotd.flow.vault:Vault.enter",
]
coding = [
    "snapshotd.coding.codec:ZfecCodec.encode",
    "snapshotd.flow.vault:Vault.seal_parity",
    "snapshotd.flow.vault:IncomingBlock._finish",
]
committing = ["snapshotd.flow.vault:Vault.free", "snapshotd.core.slot:SlotMachine.encoded"]
points = [
    (f"{boundary}:{when}", role)
    for boundaries, role in ((sealing, "smp"), (coding, "smp"), (committing, "both"))
    for boundary in boundaries
    for when in EITHER
]


def name(point: tuple[str, str]) -> str:
    module, path, when = point[0].split(":")
    return f"{when}-{module.rpartition('.')[2]}-{path}-{point[1]}"


@pytest.mark.parametrize("point", points, ids=name)
def test_killed_at(cluster: Callable[..., Cluster], tmp_path: Path, point: tuple[str, str]) -> None:
    where, role = point
    made = cluster(parity=2)
    arm = tmp_path / "armed"
    nodes = [made.node(f"n{i}") for i in range(3)]
    deadly = {
        "TEST_KILL": f"{where}:{role}",
        "TEST_KILL_ARM": str(arm),
        "PYTHONPATH": str(FAULTS),
    }
    for node in nodes:
        node.start(**(deadly if node.name == "n1" else {}))
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    arm.touch()
    job.train(1)
    eventually("the daemon has struck itself", lambda: not arm.exists())
    if role == "both":
        assert nodes[1].process is not None
        nodes[1].process.wait(10)
        nodes[1].start()

    def back() -> bool:
        job.train(1)
        return all(r.snap.status().connected for r in job.ranks)

    eventually("the trainer has found its daemon again", back, pause_s=0.2)
    job.train_until_protected()
    job.check()
    committed = job.next_step - 1
    job.vanish()
    job = Job(homes(nodes))
    assert [r.step for r in job.restore()] == [committed] * 3
    job.check()
    job.close()


def test_smp_killed_while_training_is_started_again(cluster: Callable[..., Cluster]) -> None:
    nodes = cluster().start(2)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    (pid,) = nodes[0].smp_pids()
    os.kill(pid, signal.SIGKILL)
    eventually("another SMP runs", lambda: nodes[0].smp_pids() not in ([], [pid]))

    def back() -> bool:
        job.train(1)
        return all(r.snap.status().connected for r in job.ranks)

    eventually("the trainer has found its daemon again", back, pause_s=0.2)
    job.train_until_protected()
    job.check()
    job.close()


def test_the_restore_point_that_a_trainer_was_told_never_moves_back(
    cluster: Callable[..., Cluster],
) -> None:
    """A daemon that starts anew knows of the first commit only, until it hears of the others."""
    nodes = cluster().start(2)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(4)
    for node in nodes:
        node.kill()
    nodes[0].start()
    snap = job.ranks[0].snap

    def back() -> bool:
        job.train(1)
        return snap.status().connected

    eventually("the trainer has found its daemon again", back, pause_s=0.2)
    with pytest.raises(ProtectionTimeout):
        snap.wait_protected(job.next_step, timeout_s=1.0)  # whatever the daemon says meanwhile
    assert snap.status().committed_step == 3
    nodes[1].start()
    job.train_until_protected()
    job.check()
    job.close()
