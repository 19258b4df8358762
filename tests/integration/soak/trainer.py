"""A trainer of the soak, forked from a process that has imported torch: `... .trainer SOCKET`.

It says what happens as lines of JSON on its connection, and takes a step when it is told to; so a
step is taken by all ranks or by none, as a collective would have it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from snapshotd_client import Refused, SnapshotdClientError
from tests.integration.ranks import WIDTH, Rank

RESTORE_S = 60.0


class SoakRank(Rank):
    """A rank whose training does not die away over tens of thousands of steps."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 50)

    def train(self) -> None:
        batch = torch.rand(8, WIDTH, generator=self.generator)
        wanted = torch.rand(8, WIDTH, generator=self.generator)
        (self.model(batch) - wanted).pow(2).mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


class Reference:
    """What an undisturbed rank's state would be after any number of steps."""

    def __init__(self, world: int) -> None:
        torch.set_num_threads(1)
        self._ranks = [SoakRank(rank, world) for rank in range(world)]
        self._digests = [[rank.digest()] for rank in self._ranks]

    def digest(self, rank: int, steps: int) -> str:
        """After `steps` steps."""
        digests = self._digests[rank]
        while len(digests) <= steps:
            self._ranks[rank].train()
            digests.append(self._ranks[rank].digest())
        return digests[steps]


class _Line:
    """The connection to the launcher."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("r")

    def say(self, **what: object) -> None:
        self._socket.sendall(json.dumps(what).encode() + b"\n")

    def hear(self) -> dict[str, Any] | None:
        """The next order; None when the launcher is gone."""
        line = self._file.readline()
        return json.loads(line) if line.endswith("\n") else None


def main(path: str) -> None:
    """Fork a trainer for each order."""
    torch.set_num_threads(1)
    logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(message)s")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    line = _Line(path)
    line.say(zygote=os.getpid())
    while (order := line.hear()) is not None:
        pid = os.fork()
        if pid == 0:
            _run(path, order)
        line.say(forked=pid, life=order["life"], rank=order["rank"])


def _run(path: str, order: dict[str, Any]) -> None:
    try:
        line = _Line(path)
        line.say(life=order["life"], rank=order["rank"])
        try:
            _train(line, order)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except SnapshotdClientError as error:
            code = error.code if isinstance(error, Refused) else ""
            line.say(error=type(error).__name__, code=code, text=str(error))
        except Exception as error:  # told to the launcher, whatever it is
            logging.exception("rank %d of life %d", order["rank"], order["life"])
            line.say(error=type(error).__name__, code="", text=str(error))
    finally:
        os._exit(0)


def _train(line: _Line, order: dict[str, Any]) -> None:
    rank = SoakRank(order["rank"], order["world"])
    node = type("Node", (), {"run_dir": Path(order["run_dir"])})
    rank.attach(node, 0, order["job"])
    snap = rank.snap
    assert snap is not None
    began_s = time.monotonic()
    line.say(asking=began_s)
    restored = snap.restore(on_lost=order["on_lost"], timeout_s=RESTORE_S)
    line.say(
        restored=restored.step if restored else -1,
        tier=restored.tier if restored else "none",
        seen=restored.values.get("seen") if restored else None,
        copied=restored.bytes_copied if restored else 0,
        decoded=restored.bytes_decoded if restored else 0,
        digest=rank.digest(),
        span=(began_s, time.monotonic()),
    )
    step = restored.step + 1 if restored else 0
    while (told := line.hear()) is not None and told["do"] == "step":
        rank.train()
        began_s = time.monotonic()
        snap.step(step, seen=step * 10)
        ended_s = time.monotonic()
        status = snap.status()
        committed = snap._news.progress.committed
        line.say(
            step=step,
            digest=rank.digest(),
            span=(began_s, ended_s),
            committed=(committed.epoch, committed.step)
            if status.committed_step is not None
            else None,
            protected=status.is_protected,
            connected=status.connected,
            skipped=status.skipped,
            why=status.why_not,
        )
        step += 1
    snap.close()
    line.say(closed=True)


if __name__ == "__main__":
    main(sys.argv[1])
