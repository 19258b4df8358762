"""The trainer's side of snapshotd: capture at step boundaries, restore bit for bit.

from snapshotd_client import Snapshotter
"""

from snapshotd_client.errors import (
    CannotProtect,
    InexactRestore,
    NoDaemon,
    NoSuchStep,
    ProtectionTimeout,
    Refused,
    ReplicasDiverged,
    SnapshotdClientError,
    SnapshotLost,
    StateChanged,
    StateMismatch,
    UnsupportedState,
    WorldChanged,
    WrongUse,
)
from snapshotd_client.results import Restored, Status
from snapshotd_client.snapshotter import Snapshotter

__all__ = [
    "CannotProtect",
    "InexactRestore",
    "NoDaemon",
    "NoSuchStep",
    "ProtectionTimeout",
    "Refused",
    "ReplicasDiverged",
    "Restored",
    "SnapshotLost",
    "SnapshotdClientError",
    "Snapshotter",
    "StateChanged",
    "StateMismatch",
    "Status",
    "UnsupportedState",
    "WorldChanged",
    "WrongUse",
]
