"""The public face: `Snapshotter`, called by hooks in the training step.

It decides nothing about the job. It captures state at step boundaries, hands it to the daemon of
this node, and brings back what the daemons decided to restore. Every wait is bounded, and a
daemon that is away costs training nothing but its protection.
"""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from snapshotd.wire.points import point
from snapshotd.wire.v1 import node_pb2, segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client import apply as applying
from snapshotd_client import capture as capturing
from snapshotd_client.asking import CONNECT_TIMEOUT_S, RestoreQuestion, refusal_of
from snapshotd_client.buffers import reading
from snapshotd_client.channel import Channel
from snapshotd_client.errors import (
    NoDaemon,
    ProtectionTimeout,
    Refused,
    WrongUse,
)
from snapshotd_client.handover import Handover
from snapshotd_client.identity import identify
from snapshotd_client.lock import TrainerLock
