"""The soak's judges find what is wrong, and nothing else. Nothing is run here."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.integration.soak.launcher import Launcher, Life, Trainer
from tests.integration.soak.ledger import Ledger

NODES = [SimpleNamespace(name=f"n{i}") for i in range(2)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "schedule.txt")


@pytest.fixture
def launcher(ledger: Ledger, tmp_path: Path) -> Launcher:
    made = Launcher(NODES, tmp_path, ledger, random.Random(0), 0.1)
    made.life = life([Trainer(i, node, pid=1000 + i) for i, node in enumerate(NODES)])
    return made


def life(trainers: list[Trainer], on_lost: str = "raise") -> Life:
    made = Life(0, on_lost, trainers)
    made.over.set()  # nothing is to be sent to anybody
    return made


def resume(launcher: Launcher, rank: int, step: int, **other: object) -> None:
    message = {
        "restored": step,
        "tier": "local",
        "seen": step * 10,
        "copied": 0,
        "decoded": 0,
        "digest": launcher.reference.digest(rank, step + 1),
        "span": [0.0, 1.0],
        **other,
    }
    launcher._hear(launcher.life, launcher.life.trainers[rank], message)


def take(launcher: Launcher, rank: int, step: int, **other: object) -> None:
    message = {
        "step": step,
        "digest": launcher.reference.digest(rank, step + 1),
        "span": [10.0, 10.1],
        "committed": (7, step),
        "protected": True,
        "connected": True,
        "skipped": 0,
        "why": "",
        **other,
    }
    launcher._hear(launcher.life, launcher.life.trainers[rank], message)


def test_a_job_that_is_well_is_not_blamed(launcher: Launcher, ledger: Ledger) -> None:
    for rank in range(2):
        resume(launcher, rank, -1, seen=None, tier="none")
    for step in range(3):
        for rank in range(2):
            take(launcher, rank, step)
    launcher.life = life([Trainer(i, node) for i, node in enumerate(NODES)])
    for rank in range(2):
        resume(launcher, rank, 2)
    assert ledger.failures == []
    assert ledger.told == 2


def test_ranks_that_resume_apart(launcher: Launcher, ledger: Ledger) -> None:
    resume(launcher, 0, 4)
    resume(launcher, 1, 3)
    assert "another one from 4" in ledger.failures[0]


def test_a_wrong_byte(launcher: Launcher, ledger: Ledger) -> None:
    resume(launcher, 0, 4, digest=launcher.reference.digest(0, 4))
    take(launcher, 1, 5, digest=launcher.reference.digest(0, 6))
    assert [f.partition("rank ")[2] for f in ledger.failures] == [
        "0 differs from the reference at step 4 after restore()",
        "1 differs from the reference at step 5 in training",
    ]


def test_values_of_another_step(launcher: Launcher, ledger: Ledger) -> None:
    resume(launcher, 0, 4, seen=30)
    assert "got the values of 30 with step 4" in ledger.failures[0]


def test_a_committed_step_that_is_forgotten(launcher: Launcher, ledger: Ledger) -> None:
    take(launcher, 0, 6)
    resume(launcher, 1, 5)
    assert "resumes from step 5; 6 was committed" in ledger.failures[0]


def test_a_silent_fresh_start(launcher: Launcher, ledger: Ledger) -> None:
    take(launcher, 0, 6)
    resume(launcher, 1, -1, seen=None, tier="none")
    assert "resumes from step -1; 6 was committed" in ledger.failures[0]


def test_a_chosen_fresh_start(launcher: Launcher, ledger: Ledger) -> None:
    take(launcher, 0, 6)
    launcher.life = life([Trainer(i, node) for i, node in enumerate(NODES)], "fresh")
    resume(launcher, 1, -1, seen=None, tier="none")
    assert ledger.failures == []


def test_a_watermark_that_moves_back(launcher: Launcher, ledger: Ledger) -> None:
    take(launcher, 0, 6)
    take(launcher, 0, 7, committed=(7, 5))
    assert "moved back from 6 to 5" in ledger.failures[0]


def test_a_step_that_waits_too_long(launcher: Launcher, ledger: Ledger) -> None:
    take(launcher, 0, 6, span=[10.0, 18.0])
    assert "step() of rank 0 at step 6 of life 0 took 8.00 s" in ledger.failures[0]


def test_time_in_which_the_trainer_was_stopped_does_not_count(
    launcher: Launcher, ledger: Ledger
) -> None:
    launcher._stops[1000] = [[9.0, 12.0], [13.0, 17.5]]
    take(launcher, 0, 6, span=[10.0, 18.0])
    assert ledger.failures == []
    assert ledger.longest["step()"][0] == pytest.approx(1.5)


def test_a_loss_is_told_to_all_or_to_none(launcher: Launcher, ledger: Ledger) -> None:
    ledger.beyond = True
    resume(launcher, 0, 4)
    lost = {"error": "SnapshotLost", "code": "lost", "text": "shard 1 is missing"}
    launcher._hear(launcher.life, launcher.life.trainers[1], lost)
    launcher._check_outcome(launcher.life)
    assert "[1] were told of a loss, [0] resumed" in ledger.failures[0]


@pytest.mark.parametrize(
    ("kind", "code", "is_clear"),
    [
        ("NoDaemon", "", True),
        ("Refused", "no-room", True),
        ("Refused", "internal", False),
        ("SnapshotLost", "lost", False),
        ("AssertionError", "", False),
    ],
)
def test_errors_of_trainers(ledger: Ledger, kind: str, code: str, is_clear: bool) -> None:
    ledger.trainer_error(0, kind, code, "why")
    assert (ledger.failures == []) is is_clear


def test_daemons_end_only_when_they_are_ended(ledger: Ledger) -> None:
    ledger.daemon_struck("n0")
    ledger.daemon_ended("n0", -9, wanted=True)
    ledger.daemon_ended("n1", 0, wanted=False)
    assert ledger.failures == []
    ledger.daemon_ended("n0", -9, wanted=True)
    ledger.daemon_ended("n1", 1, wanted=True)
    assert len(ledger.failures) == 2


def test_a_traceback_in_a_log(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "daemon-n0.log").write_text("all is well\n")
    ledger.read_logs(tmp_path)
    assert ledger.failures == []
    (tmp_path / "daemon-n1.log").write_text("all is well\nTraceback (most recent call last):\n")
    ledger.read_logs(tmp_path)
    assert "daemon-n1.log:2" in ledger.failures[0]
