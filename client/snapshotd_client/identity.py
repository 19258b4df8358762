"""Who this trainer is: job, rank, world and slot, from arguments or the environment.

Nothing is guessed where the environment is half there: a rank that is silently taken for 0 on
every node would have all of them write the same shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapshotd_client.errors import WrongUse

CLIENT_VERSION: Final = "0.1.0"
DEFAULT_RUN_DIR: Final = "/run/snapshotd"

#: torchrun's run id when none was given to it: every such job would share the name.
_NO_RUN_ID: Final = frozenset({"", "none"})

_RANK_SOURCES: Final = {
    "rank": ("SNAPSHOTD_RANK", "RANK"),
    "world_size": ("SNAPSHOTD_WORLD_SIZE", "WORLD_SIZE"),
    "local_rank": ("SNAPSHOTD_LOCAL_RANK", "LOCAL_RANK"),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """One trainer of one run of a job."""

    job: str
    run_id: str
    restart_count: int
    rank: int
    world_size: int
    local_rank: int
    run_dir: Path


def identify(
    environ: Mapping[str, str],
    *,
    job: str | None,
    rank: int | None,
    world_size: int | None,
    local_rank: int | None,
    run_dir: str | Path | None,
) -> Identity:
    """Settle who this trainer is; arguments win over SNAPSHOTD_*, these over torchrun's variables.

    Raises:
        WrongUse: something needed is missing, or contradicts the rest.
    """
    given = {"rank": rank, "world_size": world_size, "local_rank": local_rank}
    found = {name: _number(name, value, environ) for name, value in given.items()}
    if all(value is None for value in found.values()):
        found = {"rank": 0, "world_size": 1, "local_rank": 0}  # plainly a single process
    if found["local_rank"] is None and found["world_size"] == 1:
        found["local_rank"] = 0
    missing = [name for name, value in found.items() if value is None]
    if missing:
        sources = ", ".join(f"{name} ({' or '.join(_RANK_SOURCES[name])})" for name in missing)
        known = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        raise WrongUse(
            f"{sources} is not set, while {known} is",
            "Start the trainer with torchrun, or pass rank, world_size and local_rank",
        )
    numbers = {name: int(value or 0) for name, value in found.items()}
    if not 0 <= numbers["rank"] < numbers["world_size"] or numbers["local_rank"] < 0:
        raise WrongUse(
            f"rank {numbers['rank']} (local rank {numbers['local_rank']}) of a world of "
            f"{numbers['world_size']}",
            "Ranks run from 0 to world_size - 1",
        )
    name = _job(job, environ)
    run_id = environ.get("TORCHELASTIC_RUN_ID", "")
    return Identity(
        job=name,
        run_id=name if run_id in _NO_RUN_ID else run_id,
        restart_count=_whole("TORCHELASTIC_RESTART_COUNT", environ) or 0,
        rank=numbers["rank"],
        world_size=numbers["world_size"],
        local_rank=numbers["local_rank"],
        run_dir=Path(run_dir or environ.get("SNAPSHOTD_RUN_DIR") or DEFAULT_RUN_DIR),
    )


def _number(name: str, given: int | None, environ: Mapping[str, str]) -> int | None:
    if given is not None:
        return given
    for variable in _RANK_SOURCES[name]:
        number = _whole(variable, environ)
        if number is not None:
            return number
    return None


def _whole(variable: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(variable)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise WrongUse(
            f"{variable} is {text!r}, a whole number was expected", f"Correct {variable}"
        ) from None


def _job(given: str | None, environ: Mapping[str, str]) -> str:
    name = given or environ.get("SNAPSHOTD_JOB") or environ.get("TORCHELASTIC_RUN_ID", "")
    if name in _NO_RUN_ID:
        raise WrongUse(
            "the job has no name",
            "Set SNAPSHOTD_JOB, pass job=..., or give torchrun an --rdzv-id: a restarted run "
            "finds its snapshots by that name",
        )
    return name
