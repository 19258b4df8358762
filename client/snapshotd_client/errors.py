"""Every error the trainer's side raises on purpose; the tree says whose fault it is.

::

    SnapshotdClientError
    ├── UnsupportedState     the caller: a state that cannot be captured exactly
    ├── StateMismatch        the caller: this run is not the one the snapshot was taken of
    ├── ReplicasDiverged     the training: ranks that should hold the same do not
    ├── StateChanged         the caller: a tensor is another one than at the last snapshot
    ├── WrongUse             the caller: rank, job or order of calls that cannot be right
    ├── InexactRestore       a `load_state_dict` that does not give back what it was given
    ├── NoSuchStep           the caller: a step is asked for that the memory does not have
    ├── NoDaemon             the node: no daemon answers
    ├── Refused              the node: the daemon says no, and why
    │   ├── SnapshotLost     the job had a restore point, and it cannot be restored now
    │   ├── CannotProtect    the job's nodes are too few for the parity that was asked for
    │   └── WorldChanged     the job was saved by another number of ranks
    └── ProtectionTimeout    the group: a snapshot was not protected in time

Anything else that escapes is a bug of ours. Each error says what was wrong with the facts, and
what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

#: How many differences a message shows; the rest is counted.
MAX_SHOWN: Final = 20


class SnapshotdClientError(Exception):
    """Base of all errors of the trainer's side.

    Attributes:
        what: what was wrong, with numbers and names.
        remedy: what the reader can do; empty where there is nothing to do.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}. {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        # Ranks tell each other their errors, whatever their constructors take.
        return _as_it_was, (type(self), str(self), self.__dict__)


def _as_it_was(
    kind: type[SnapshotdClientError], text: str, state: dict[str, object]
) -> SnapshotdClientError:
    error = kind.__new__(kind, text)
    error.__dict__.update(state)
    return error


class UnsupportedState(SnapshotdClientError):
    """A state that cannot be captured so that it comes back exactly."""


class StateMismatch(SnapshotdClientError):
    """The snapshot was taken of something else; nothing of the live state was changed.

    Attributes:
        differences: one sentence for each, all of them.
    """

    def __init__(self, differences: Sequence[str], remedy: str = "") -> None:
        shown = "".join(f"\n  {d}" for d in differences[:MAX_SHOWN])
        rest = len(differences) - MAX_SHOWN
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        super().__init__(
            f"the snapshot does not fit this run, {len(differences)} difference(s):{shown}{more}\n"
            "No live state was changed",
            remedy or "Build the same objects as the run that wrote it, or use another job name.",
        )
        self.differences = tuple(differences)


class InexactRestore(SnapshotdClientError):
    """Live state differs from the snapshot after it was applied; training must not go on."""


class StateChanged(SnapshotdClientError):
    """A tensor has another shape or dtype than at the last snapshot."""


class ReplicasDiverged(SnapshotdClientError):
    """Ranks that hold the same state have different bytes of it; older snapshots are untouched.

    Attributes:
        differences: a sentence for each tensor, all of them, with the ranks.
    """

    def __init__(self, step: int, differences: Sequence[str]) -> None:
        shown = "; ".join(differences[:MAX_SHOWN])
        rest = len(differences) - MAX_SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        super().__init__(
            f"after step {step} replicas differ: {shown}{more}",
            "Training has gone wrong on some rank (hardware, or an update that is not the same "
            "everywhere): restart from the last snapshot. Where these are no replicas, leave them "
            "out of replicas=",
        )
        self.differences = tuple(differences)


class WrongUse(SnapshotdClientError):
    """A rank, a job name or an order of calls that cannot be right."""


class NoSuchStep(SnapshotdClientError):
    """The daemons hold no step of the job, or another one."""


class NoDaemon(SnapshotdClientError):
    """No daemon answers on this node."""


class Refused(SnapshotdClientError):
    """The daemon refuses a request.

    Attributes:
        code: stable name of the reason, an `ErrorCode` of snapshotd.wire.protocol.
    """

    def __init__(self, code: str, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.code = code


class SnapshotLost(Refused):
    """The job had a restore point, and nothing can be restored; names what is missing."""


class CannotProtect(Refused):
    """The job runs on too few nodes for the wanted parity, or in too large groups.

    Nothing was given up: what the job had saved is there when it comes back on nodes that suffice.
    A fresh start does not help.
    """


class WorldChanged(Refused):
    """The job was saved by another number of ranks, and some rank cannot take that up."""


class ProtectionTimeout(SnapshotdClientError):
    """A snapshot was not committed within the time given; names whom it waits for."""


def no_daemon(run_dir: Path, why: str) -> NoDaemon:
    """The error that says how to start a daemon."""
    return NoDaemon(
        f"no snapshotd answers in {run_dir} ({why})",
        "Start one on this node: `snapshotd serve --config FILE`, `systemctl start snapshotd`, or "
        "launch the job with `snapshotd run -- torchrun ...`; if it uses another directory, set "
        "SNAPSHOTD_RUN_DIR or pass run_dir=...",
    )
