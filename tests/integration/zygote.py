"""Trainer processes for tests: one process imports torch and forks a trainer for each request.

A request is a line of JSON on standard input; the answer is the trainer's pid. The trainer writes
what happens to it as lines of JSON to its own file, and can SIGKILL itself at a named point.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Points where a trainer can die: (what it does, before or after, which time it does it).
Point = tuple[str, str, int]


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
        """Start a trainer; returns its pid."""
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
        self._process.wait(10)


def said(path: Path) -> list[dict[str, Any]]:
    """What a trainer has written so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _main() -> None:
    import tests.integration.ranks  # noqa: F401  # torch is imported once, here

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            _train(json.loads(line))
            os._exit(0)
        print(pid, flush=True)


def _train(request: dict[str, Any]) -> None:
    import torch

    from tests.integration.ranks import Rank

    torch.set_num_threads(1)
    out = Path(request["out"])

    def say(**what: object) -> None:
        with out.open("a") as file:
            file.write(json.dumps(what) + "\n")

    try:
        if request.get("point"):
            _arm(*request["point"])
        rank = Rank(request["rank"], request["world"])
        node = type("Node", (), {"run_dir": Path(request["run_dir"])})
        rank.attach(node, request.get("slot", 0), request["job"])
        assert rank.snap is not None
        restored = rank.snap.restore()
        say(restored=restored.step if restored else None, digest=rank.digest())
        step = restored.step + 1 if restored else 0
        for now in range(step, request["until"]):
            rank.train()
            rank.snap.step(now)
            if request.get("protect", True):
                rank.snap.wait_protected(timeout_s=20)
            say(step=now, digest=rank.digest())
        if request.get("linger"):
            signal.pause()
        rank.snap.close()
        say(done=True)
    except BaseException as error:  # noqa: BLE001  # told to the test, whatever it is
        say(error=f"{type(error).__name__}: {error}")


def _arm(what: str, when: str, count: int) -> None:
    """Have this process SIGKILL itself before or after the count-th time it does `what`."""
    from snapshotd_client import apply, buffers, capture, channel, snapshotter

    places: dict[str, tuple[Any, str]] = {
        "send": (channel.Channel, "_send"),  # "send:claim": messages of that kind only
        "lock": (channel.TrainerLock, "acquire"),
        "plan": (capture, "plan"),
        "map": (buffers.Buffers, "_mapping"),
        "write": (capture.Capture, "write"),
        "put": (capture, "_put"),
        "apply": (apply, "apply"),
        "restore-one": (apply, "_restore_module"),
        "close": (snapshotter.Snapshotter, "_let_go"),
    }
    what, _, kind = what.partition(":")
    owner, name = places[what]
    left = [count]
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def deadly(*arguments: Any, **options: Any) -> Any:
        counts = not kind or arguments[1].WhichOneof("body") == kind
        left[0] -= int(counts)
        if counts and left[0] == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if counts and left[0] == 0 and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    _main()
