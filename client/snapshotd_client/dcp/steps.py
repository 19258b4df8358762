"""Which step a checkpoint_id means. Pure."""

from __future__ import annotations

import os
import re
from typing import Final

from snapshotd_client.errors import WrongUse

CheckpointId = str | os.PathLike[str] | int

_LAST_NUMBER: Final = re.compile(r"(\d+)$")


def step_of(checkpoint_id: CheckpointId) -> int:
    """The number that the last part of it ends with: 100 for "outputs/checkpoint/step-100".

    Raises:
        WrongUse: it ends with none, or the number is negative.
    """
    if isinstance(checkpoint_id, int):
        if checkpoint_id < 0:
            raise WrongUse(f"step {checkpoint_id} is negative", "Count steps from 0")
        return checkpoint_id
    text = os.fspath(checkpoint_id).rstrip("/")
    found = _LAST_NUMBER.search(text.rpartition("/")[2])
    if found is None:
        raise WrongUse(
            f"checkpoint_id {text!r} does not end with the number of a step",
            'Name it like "step-100"',
        )
    return int(found.group())


def is_step(checkpoint_id: CheckpointId) -> bool:
    """Whether a checkpoint_id names a step."""
    try:
        step_of(checkpoint_id)
    except (WrongUse, TypeError):
        return False
    return True
