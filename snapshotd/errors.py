"""Every error the daemon raises on purpose; the tree says whose fault it is.

::

    SnapshotdError
    ├── CallerError          the one who asked: a config, a request, a message
    │   ├── ConfigError      a key, a flag, a variable
    │   └── RequestError     a trainer's or an operator's request; carries a stable code
    ├── PeerError            another node: unreachable, foreign, of another version
    │   └── Misbehaved       it sent what no honest node sends; says what
    ├── TooFewBlocks         the group lost more than its parity can give back
    ├── NoRoom               memory, budget, descriptors
    ├── Busy                 another process of this node stands in the way, and does not move
    └── DamagedBytes         bytes that are not what was sealed: a flipped bit, a cut file

Anything else that escapes is a bug of ours. Each error says what was wrong with the facts, and
what to do about it; `transient` says whether waiting may heal it.
"""

from __future__ import annotations

from snapshotd.wire.protocol import ErrorCode


class SnapshotdError(Exception):
    """Base of all errors of the daemon.

    Attributes:
        what: what was wrong, with numbers and names.
        remedy: what the reader can do; empty where there is nothing to do.
        transient: whether the same request may succeed later, unchanged.
    """

    transient = False

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}. {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class CallerError(SnapshotdError):
    """The one who asked must change something."""


class ConfigError(CallerError):
    """A configuration that cannot be served."""


class RequestError(CallerError):
    """A request that cannot be granted; `code` is stable and travels to the trainer."""

    def __init__(self, code: ErrorCode, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.code = code


class PeerError(SnapshotdError):
    """Another node did not do its part."""

    transient = True


class Misbehaved(PeerError):
    """Another node sent what no honest node sends; `misdeed` says what, in words."""

    def __init__(self, misdeed: str, what: str) -> None:
        super().__init__(what)
        self.misdeed = misdeed


class TooFewBlocks(SnapshotdError):
    """More of a group is lost than its code gives back."""


class NoRoom(SnapshotdError):
    """Memory, budget or descriptors do not suffice."""


class Busy(SnapshotdError):
    """Another process of this node keeps what is needed, and does not get on."""

    transient = True


class DamagedBytes(SnapshotdError):
    """Bytes differ from what was sealed."""


def exit_code(error: SnapshotdError) -> int:
    """What a program ends with for it: 2 for wrong input, 1 for any other failure."""
    return 2 if isinstance(error, CallerError) else 1
