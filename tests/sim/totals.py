"""Totals of a range of seeds: added up in memory, between processes, and between files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .run import Outcome


@dataclass
class Totals:
    """Counts of many runs; two of different ranges add up."""

    ranges: list[list[int]] = field(default_factory=list)  # [first, one past the last]
    cpu_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.counts.update(outcome.counts)
        self.injected.update(outcome.injected)
        self.seen.update(outcome.seen)

    def merge(self, other: Totals) -> None:
        self.ranges += other.ranges
        self.cpu_s += other.cpu_s
        self.counts.update(other.counts)
        self.injected.update(other.injected)
        self.seen.update(other.seen)
        self.failures += other.failures

    def to_json(self) -> str:
        seeds = max(1, self.counts["seeds"])
        return json.dumps(
            {
                "ranges": sorted(self.ranges),
                "cpu_s": round(self.cpu_s, 1),
                "cpu_ms_a_seed": round(1000 * self.cpu_s / seeds, 2),
                "counts": dict(self.counts.most_common()),
                "faults injected": sum(self.injected.values()),
                "kinds of faults": sum(1 for n in self.injected.values() if n > 0),
                "injected": dict(self.injected.most_common()),
                "seen": dict(self.seen.most_common()),
                "failures": self.failures,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Totals:
        value = json.loads(text)
        return cls(
            ranges=value["ranges"],
            cpu_s=value["cpu_s"],
            counts=Counter(value["counts"]),
            injected=Counter(value["injected"]),
            seen=Counter(value["seen"]),
            failures=value["failures"],
        )
