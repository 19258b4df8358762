"""Whom the kernel ends when memory runs out: this process's own score, and what it may set."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Final

from snapshotd.errors import ConfigError

log = logging.getLogger(__name__)

_FILE: Final = Path("/proc/self/oom_score_adj")


def oom_score_adj(file: Path = _FILE) -> int:
    """The adjustment in force, -1000 (never ended) to 1000 (the first). Children inherit it."""
    return int(file.read_text(encoding="utf-8"))


def set_oom_score_adj(value: int, file: Path = _FILE) -> None:
    """Set it for this process and the children it starts from now on.

    Raises:
        ConfigError: the kernel does not allow it: to be safer than it was started takes a
            privilege.
    """
    try:
        file.write_text(f"{value}\n", encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
        raise ConfigError(
            f"oom_score_adj = {value} is refused by the kernel ({error.strerror}); it is "
            f"{oom_score_adj(file)} now, and only a process with CAP_SYS_RESOURCE may go below "
            "what it was started with",
            "Let the service manager set it (OOMScoreAdjust= in the unit) and remove the key, or "
            f"set one of {oom_score_adj(file)} to 1000",
        ) from error


def settle(wanted: int | None, file: Path = _FILE) -> None:
    """Set the score where one is wanted, else say so where the daemon is no safer than others.

    Memory of segments is not freed by ending the daemon, so ending it never helps the machine.

    Raises:
        ConfigError: as `set_oom_score_adj`.
    """
    if wanted is not None:
        set_oom_score_adj(wanted, file)
        log.info("oom_score_adj of the daemon and its SMPs is %d", wanted)
        return
    score = oom_score_adj(file)
    if score >= 0:
        log.log(
            logging.WARNING if score > 0 else logging.INFO,
            "oom_score_adj is %d, so the kernel may end this daemon when memory runs out, which "
            "frees none of its segments; a service manager can lower it (OOMScoreAdjust=-900)",
            score,
        )
