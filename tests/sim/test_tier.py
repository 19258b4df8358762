"""Steps in the persistent tier keep their laws, and planted faults break them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest

from snapshotd.core import persist
from snapshotd.core import tier as core_tier
from snapshotd.errors import DamagedBytes
from snapshotd.metadata import JobFacts, StoredStep, Version
from snapshotd.tier import layout
from snapshotd.tier.store import Store

from . import tier
from .tier import Files, World
from .violation import Violation

SEEDS = range(12)


@pytest.mark.timeout(300)
def test_whatever_dies_at_whatever_operation_a_step_is_whole_or_does_not_count() -> None:
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        world = World(seed)
        world.run()
        counts += world.counts + Files.injected
    for what in ("published", "restored", "restored by another world", "killed at half written"):
        assert counts[what], (what, counts)


def _the_newest_is_removed() -> tuple[Any, str, Any]:
    def removable(steps: Iterable[StoredStep], _: object) -> list[Version]:
        return [s.version for s in steps]

    return tier, "removable", removable


def _it_is_made_whole_too_soon() -> tuple[Any, str, Any]:
    def states(_self: Any, _job: Any, work: Any, _slots: Any) -> list[Any]:
        return [work.told]

    return persist.Persistence, "_states", states


def _the_record_comes_before_the_image() -> tuple[Any, str, Any]:
    real = Store.write

    def write(self: Store, image: memoryview, record: Any, *more: Any) -> bool:
        version = Version(record.version.epoch, record.version.step)
        path = layout.seal_path(self._root, version, record.shard)
        self._put(path, record.SerializeToString())
        return real(self, image, record, *more)

    return Store, "write", write


def _the_oldest_is_taken() -> tuple[Any, str, Any]:
    def candidates(self: core_tier.TierView, world: int, *, able: bool) -> list[StoredStep]:
        steps = self.stored.steps if self.stored else ()
        return sorted((s for s in steps if able or s.world == world), key=lambda s: s.version)

    return core_tier.TierView, "candidates", candidates


def _what_others_saved_is_written_by_these() -> tuple[Any, str, Any]:
    return JobFacts, "handed_on", property(lambda _: False)


MUTATIONS: list[Callable[[], tuple[Any, str, Any]]] = [
    _the_newest_is_removed,
    _it_is_made_whole_too_soon,
    _the_record_comes_before_the_image,
    _the_oldest_is_taken,
    _what_others_saved_is_written_by_these,
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_fault_is_seen(mutation: Callable[[], tuple[Any, str, Any]]) -> None:
    with mock.patch.object(*mutation()), pytest.raises((Violation, DamagedBytes)):
        for seed in SEEDS:
            World(seed).run()
