"""The trainer's side of snapshotd: capture at step boundaries, restore bit for bit.

from snapshotd_client import Snapshotter
"""

from snapshotd_client.errors import (
    InexactRestore,
    NoDaemon,
    ProtectionTimeout,
    Refused,
    SnapshotdClientError,
    SnapshotLost,
    StateChanged,
    StateMismatch,
    UnsupportedState,
    WrongUse,
)
from snapshotd_client.results import Restored, Status
from snapshotd_client.snapshotter import Snapshotter

__all__ = [
    "InexactRestore",
    "NoDaemon",
    "ProtectionTimeout",
    "Refused",
    "Restored",
    "SnapshotLost",
    "SnapshotdClientError",
    "Snapshotter",
    "StateChanged",
    "StateMismatch",
    "Status",
    "UnsupportedState",
    "WrongUse",
]
