"""What a run has seen, and what of it is wrong. Everything is judged here as it is told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

#: `max_stall_s` of the Snapshotter, and what a busy machine may add to it.
STEP_BOUND_S = 1.0 + 2.0
RESTORE_BOUND_S = 60.0 + 10.0

#: Errors that a trainer may end with while its node is being tormented: clear, and nothing loaded.
CLEAR = {"NoDaemon", "ProtectionTimeout"}
CLEAR_CODES = {"no-room", "duplicate-rank", "busy"}

#: What no log may hold.
_NEVER = (
    "Traceback",
    "never retrieved",
    "was destroyed but",
    "Fatal Python error",
    "Segmentation fault",
)


@dataclass
class Ledger:
    """Counts, extremes and failures of a run."""

    events: Path
    on_failure: Callable[[], None] = lambda: None
    began_s: float = field(default_factory=time.monotonic)
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    restores: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    longest: dict[str, tuple[float, str]] = field(default_factory=dict)
    told: int | None = None  # newest step that any rank was told is committed
    beyond: bool = False  # more memories were lost than the parity bears
    _struck: Counter[str] = field(default_factory=Counter)

    def note(self, text: str) -> None:
        """One line of the run's history."""
        with self.events.open("a") as file:
            file.write(f"{time.monotonic() - self.began_s:9.3f} {text}\n")

    def fail(self, text: str) -> None:
        """Something is wrong: the run ends soon, so that the logs are fresh."""
        self.note(f"FAILURE {text}")
        self.failures.append(f"at {time.monotonic() - self.began_s:.1f} s: {text}")
        self.on_failure()

    def fault(self, kind: str, detail: str) -> None:
        self.faults[kind] += 1
        self.note(f"fault {kind}: {detail}")

    # -- daemons

    def daemon_struck(self, name: str) -> None:
        """It is about to be killed by us."""
        self._struck[name] += 1

    def daemon_ended(self, name: str, code: int, *, wanted: bool) -> None:
        struck, self._struck[name] = self._struck[name], 0
        self.note(f"daemon {name} ended with {code}")
        if code != -9 and wanted:
            self.fail(f"the daemon {name} ended by itself with {code}")
        elif code == -9 and not struck:
            self.fail(f"the daemon {name} was killed, and not by us")

    # -- trainers

    def commit_told(self, rank: int, step: int, before: int | None) -> None:
        """A rank was told that a step is committed."""
        if before is not None and step < before:
            self.fail(f"the watermark of rank {rank} moved back from {before} to {step}")
        self.told = step if self.told is None else max(self.told, step)

    def resumed(self, rank: int, step: int, tier: str, *, fresh_is_fine: bool) -> None:
        """A rank got the answer to restore(); -1: a fresh start."""
        self.restores[tier] += 1
        if step < 0 and fresh_is_fine:
            return
        if self.told is not None and step < self.told and not self.beyond:
            self.fail(f"rank {rank} resumes from step {step}; {self.told} was committed")

    def trainer_error(self, rank: int, kind: str, code: str, text: str) -> None:
        """A trainer ended with an error."""
        self.note(f"rank {rank} ends with {kind} {code}: {text}")
        self.errors[f"{kind} {code}".strip()] += 1
        if kind == "SnapshotLost" and self.beyond:
            return
        if kind in CLEAR or (kind == "Refused" and code in CLEAR_CODES):
            return
        self.fail(f"rank {rank} ended with {kind} {code}: {text}")

    def blocked(self, what: str, took_s: float, who: str, bound_s: float) -> None:
        """Someone waited for the daemons for that long."""
        if took_s > self.longest.get(what, (0.0, ""))[0]:
            self.longest[what] = (took_s, who)
        if took_s > bound_s:
            self.fail(f"{what} of {who} took {took_s:.2f} s, the bound is {bound_s:.1f} s")

    def read_logs(self, logs: Path) -> None:
        """Look for what must not be in any of them."""
        for path in sorted(logs.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()
            for number, line in enumerate(lines):
                if any(word in line for word in _NEVER):
                    tail = "\n    ".join(lines[max(0, number - 2) : number + 30])
                    self.fail(f"{path.name}:{number + 1}:\n    {tail}")
                    break
