"""One run: a seed, a setup, a list of faults; what it counted, or which law it broke."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field

from .cluster import Cluster
from .faults import Fault, draw
from .setup import Setup, setup_of
from .violation import Violation


@dataclass(frozen=True)
class Case:
    """All that determines a run."""

    seed: int
    setup: Setup
    faults: tuple[Fault, ...]


@dataclass
class Outcome:
    """What came of it: counts by name, and the broken law, empty where none was."""

    law: str = ""
    what: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)


def case_of(seed: int, rare: str = "") -> Case:
    setup = setup_of(seed, rare)
    return Case(seed, setup, draw(seed, setup))


def run(case: Case) -> Outcome:
    """Run a case to its end, or to the first broken law."""
    cluster = Cluster(case.seed, case.setup)
    outcome = Outcome(injected=cluster.injected, seen=cluster.seen)
    try:
        cluster.run(case.faults)
    except Violation as broken:
        outcome.law, outcome.what = broken.law, str(broken)
    except Exception as error:  # noqa: BLE001 - whatever escapes from core is a finding
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].name}"
        outcome.law = f"{type(error).__name__} in {where}"
        outcome.what = "".join(traceback.format_exception(error))
    outcome.what += f"\n  at {cluster.clock.now_s:.3f} s" if outcome.law else ""
    outcome.counts.update(_counts(cluster))
    return outcome


def _counts(cluster: Cluster) -> dict[str, int]:
    oracle = cluster.oracle
    return {
        "seeds": 1,
        "nodes": len(cluster.nodes),
        "virtual ms": int(cluster.clock.now_s * 1000),
        "messages": cluster.network.messages,
        "instructions": cluster.instructions,
        "commits": oracle.commits,
        "shards restored": oracle.restores,
        "answers of refusal": oracle.refusals,
        "fallbacks": oracle.fallbacks,
        "fresh starts": oracle.fresh,
        "runs that gave up parity": int(oracle.rows_given_up > 0),
    }
