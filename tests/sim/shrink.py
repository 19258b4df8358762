"""Fewer faults that break the same law: delta debugging, bounded in runs; and the written case."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import asdict, replace

from .faults import KINDS, Fault
from .run import Case, Outcome, run
from .setup import RARE, Setup

MAX_RUNS = 150


def shrink(case: Case, law: str, runs: int = MAX_RUNS) -> Case:
    """The case with as few faults as `runs` tries find that still break `law`."""
    budget = _Budget(runs)

    def breaks(faults: tuple[Fault, ...]) -> bool:
        return budget.left() and run(replace(case, faults=faults)).law == law

    faults = case.faults
    if breaks(()):
        return replace(case, faults=())
    parts = 2
    while len(faults) > 1:
        fewer = _without_a_part(faults, parts, breaks)
        if fewer is not None:
            faults, parts = fewer, max(2, parts - 1)
        elif parts >= len(faults) or budget.spent:
            break
        else:
            parts = min(len(faults), parts * 2)
    return replace(case, faults=faults)


class _Budget:
    def __init__(self, runs: int) -> None:
        self._runs = runs

    @property
    def spent(self) -> bool:
        return self._runs <= 0

    def left(self) -> bool:
        self._runs -= 1
        return self._runs >= 0


def _without_a_part(
    faults: tuple[Fault, ...], parts: int, breaks: Callable[[tuple[Fault, ...]], bool]
) -> tuple[Fault, ...] | None:
    """Leave out one of `parts` equal parts, the last first: what comes late matters least."""
    bounds = [len(faults) * i // parts for i in range(parts + 1)]
    for i in reversed(range(parts)):
        fewer = faults[: bounds[i]] + faults[bounds[i + 1] :]
        if len(fewer) < len(faults) and breaks(fewer):
            return fewer
    return None


def written(case: Case, outcome: Outcome) -> str:
    """A Python literal that `python -m tests.sim --replay FILE` runs again."""
    lines = [
        f"# {outcome.law}",
        "{",
        f"    'seed': {case.seed},",
        f"    'setup': {asdict(case.setup)},",
        "    'faults': [",
        *(f"        {tuple(fault)}," for fault in case.faults),
        "    ],",
        "}",
    ]
    return "\n".join(lines) + "\n"


def read(text: str) -> Case:
    """What `written` wrote. Raises ValueError for anything else."""
    try:
        value = ast.literal_eval(text)
        setup = Setup(**value["setup"])
        faults = tuple(Fault(*fields) for fields in value["faults"])
        unknown = {f.kind for f in faults} - {*KINDS, *RARE}
    except (SyntaxError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a case as a failing run prints it: {error}") from error
    if unknown:
        raise ValueError(f"unknown kinds of faults: {', '.join(sorted(unknown))}")
    return Case(int(value["seed"]), setup, faults)
