"""Where training waits for the faults, so that on the slowest machine too each finds it going on.

Before the step that a fault is due at, training waits until the one before is over. Half-way to
the next one it waits until what the fault took down is up again: what is to be seen of that needs
steps. Before its end it waits for the last fault. Where the faults are in time, nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Final

# torch exports it without saying so to type checkers.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

#: Steps that are to be seen while a daemon is away.
STEPS_WITHOUT_DAEMON: Final = 3
#: Longer than a fault takes on a slow machine; the demo itself has given up by then.
WAIT: Final = timedelta(seconds=300)


def fault_steps(steps: int, count: int) -> list[int]:
    """Steps at which `count` faults strike: early enough that each has room after it."""
    return [steps * (2 * i + 1) // (2 * count + 1) for i in range(count)]


def gates(steps: int, count: int) -> dict[int, list[str]]:
    """The gates before each step, by name: `due/N`, of fault N or of the end, and `half/N`."""
    if not count:
        return {}
    due = [*fault_steps(steps, count), steps]
    found = {step: [f"due/{number}"] for number, step in enumerate(due)}
    for number, (step, following) in enumerate(pairwise(due)):
        half = max((step + following) // 2, step + STEPS_WITHOUT_DAEMON + 1)
        if half < following:
            found[half] = [f"half/{number}"]
    return found


class Gatekeeper:
    """The demo's side: opens the gates of one run, each for good."""

    def __init__(self, store: TCPStore, run: str) -> None:
        self._store = store
        self._run = run
        self._fault = -1

    def next(self) -> None:
        """The next fault may strike, or training may end: what was before is over."""
        self.up_again()
        self._fault += 1
        self._store.set(_key(self._run, f"due/{self._fault}"), "open")

    def up_again(self) -> None:
        """What the fault took down is up again."""
        if self._fault >= 0:
            self._store.set(_key(self._run, f"half/{self._fault}"), "open")


class Gates:
    """The trainer's side."""

    def __init__(self, port: int, run: str, steps: int, count: int) -> None:
        """`port` of the demo's store; of `count` faults."""
        self._run = run
        self._gates = gates(steps, count)
        self._store = TCPStore("127.0.0.1", port, is_master=False) if count else None

    def wait(self, step: int, before: Callable[[], None]) -> None:
        """Pass the gate before a step.

        Args:
            step: that is about to begin; the number of all steps for the end.
            before: called before it waits for a fault to be over, for what is still to be told.

        Raises:
            DistStoreError: nobody opened it within WAIT.
        """
        for name in self._gates.get(step, ()):
            assert self._store is not None, "there is a gate"
            key = _key(self._run, name)
            if not self._store.check([key]):
                if name.startswith("due"):
                    before()
                self._store.wait([key], WAIT)


def _key(run: str, gate: str) -> str:
    return f"snapshotd-demo/{run}/{gate}"
