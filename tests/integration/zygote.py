"""Trainer processes for tests: one process imports torch and forks a trainer for each request.

A request is a line of JSON on standard input; the answer is the trainer's pid. The trainer writes
what happens to it as lines of JSON to its own file, and dies where its fault point is armed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

#: How long a trainer waits for the protection of a step before it trains the next.
PROTECT_S = 1.0
#: The same for one that ends after some steps, all of which are to be committed.
COMMIT_S = 60.0


class Zygote:
    """The parent's side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def trainer(self, **request: object) -> int:
        """Start a trainer; returns its pid.

        Args:
            request: rank, world, run_dir, job, out; slot; `alike`, whether all ranks train the
                same; `early`, whether they tell of small images, too, what stands; `until` a
                step, or for ever; then `close`, or linger; `watches` an arm file of its own;
                `arms` [step, file, text] writes an arm file before it trains that step.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


def said(path: Path) -> list[dict[str, Any]]:
    """What a trainer has written so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def write_arm(file: Path, text: str) -> None:
    """Arm a point; the file appears whole."""
    half = file.with_suffix(".new")
    half.write_text(text)
    half.replace(file)


def _main() -> None:
    from tests.integration.ranks import Rank

    Rank(0, 1)  # what torch imports for a first optimizer is imported once, here

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            _Trainer(json.loads(line)).run()
            os._exit(0)
        print(pid, flush=True)


class _Peers:
    """The other ranks of the same life: no rank trains a step before all have trained the last.

    As in a real job, whose collectives wait for all ranks; a rank that dies stops the others.
    """

    def __init__(self, out: Path, rank: int, world: int) -> None:
        life = out.name.rpartition("-")[0]
        self._others = [str(out.with_name(f"{life}-{r}.sock")) for r in range(world) if r != rank]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(out.with_name(f"{life}-{rank}.sock")))
        self._early = 0  # of the next step

    def meet(self, step: int) -> None:
        for other in self._others:
            with contextlib.suppress(ConnectionError, FileNotFoundError):
                self._socket.sendto(str(step).encode(), other)
        here, self._early = self._early, 0
        while here < len(self._others):
            if int(self._socket.recv(32)) == step:
                here += 1
            else:
                self._early += 1


class _Trainer:
    """The life of one trainer process."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self._out = Path(request["out"])

    def run(self) -> None:
        try:
            self._live()
        except BaseException as error:  # noqa: BLE001  # told to the test, whatever it is
            self._say(error=f"{type(error).__name__}: {error}")

    def _live(self) -> None:
        import torch

        from snapshotd.wire import points
        from snapshotd_client import flight
        from tests.integration.ranks import Rank

        torch.set_num_threads(1)
        request = self._request
        if request.get("watches"):
            points.watch({points.ARM_VARIABLE: request["watches"]})
        if request.get("early"):
            flight._TELL_BYTES = 1
        alike = request.get("alike", False)
        rank = Rank(0 if alike else request["rank"], request["world"])
        rank.rank = request["rank"]
        peers = _Peers(self._out, rank.rank, rank.world)
        node = type("Node", (), {"run_dir": Path(request["run_dir"])})
        replicas = {"replicas": range(rank.world)} if alike else {}
        rank.attach(node, request.get("slot", 0), request["job"], **replicas)
        assert rank.snap is not None
        restored = rank.snap.restore()
        self._say(restored=restored.step if restored else None, digest=rank.digest())
        step = restored.step + 1 if restored else 0
        while request.get("until") is None or step < request["until"]:
            self._step(rank, step)
            peers.meet(step)
            step += 1
        if request.get("close"):
            rank.snap.close()
            self._say(done=True)
            return
        signal.pause()

    def _step(self, rank: Any, step: int) -> None:
        from snapshotd_client import ProtectionTimeout, WrongUse

        at, file, text = self._request.get("arms") or (-1, "", "")
        if step == at:
            write_arm(Path(file), text)
            self._say(armed=text)
        rank.train()
        rank.snap.step(step)
        self._say(step=step, digest=rank.digest())
        timeout_s = PROTECT_S if self._request.get("until") is None else COMMIT_S
        try:
            self._say(protected=rank.snap.wait_protected(timeout_s=timeout_s))
        except (ProtectionTimeout, WrongUse) as error:  # the latter: no snapshot was taken yet
            self._say(unprotected=str(error))

    def _say(self, **what: object) -> None:
        with self._out.open("a") as file:
            file.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    _main()
