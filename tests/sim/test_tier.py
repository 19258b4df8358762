"""Steps in the persistent tier keep their laws, and planted faults break them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest

from snapshotd.core import tier as core_tier
from snapshotd.errors import DamagedBytes
from snapshotd.metadata import StoredStep, Version
from snapshotd.tier import layout
from snapshotd.tier.store import Store

from .files import Files
from .tier import World
from .violation import Violation

SEEDS = range(8)


@pytest.mark.timeout(300)
def test_whatever_dies_at_whatever_operation_a_step_is_whole_or_does_not_count() -> None:
    counts = run_all()
    for what in ("published", "restored", "restored by another world", "killed at half written"):
        assert counts[what], (what, counts)


def _older_steps_go_before_the_new_one_is_whole() -> tuple[Any, str, Any]:
    real = Store.publish

    def publish(self: Store, version: Version, world: int, number: int) -> layout.Index:
        self.remove(s.version for s in self.look().steps)
        return real(self, version, world, number)

    return Store, "publish", publish


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


def _images_are_deleted_before_their_index() -> tuple[Any, str, Any]:
    def remove(self: Store, versions: Iterable[Version]) -> None:
        for version in versions:
            with self._asking("delete"), suppress(FileNotFoundError):
                data = f"{layout.data_path(self._root)}/{layout.version_name(version)}"
                self._fs.rm(data, recursive=True)
                self._fs.rm_file(layout.index_path(self._root, version))

    return Store, "remove", remove


MUTATIONS: list[Callable[[], tuple[Any, str, Any]]] = [
    _older_steps_go_before_the_new_one_is_whole,
    _the_record_comes_before_the_image,
    _the_oldest_is_taken,
    _images_are_deleted_before_their_index,
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_fault_is_seen(mutation: Callable[[], tuple[Any, str, Any]]) -> None:
    with mock.patch.object(*mutation()), pytest.raises((Violation, DamagedBytes)):
        run_all()


def run_all() -> Counter[str]:
    """What came of all seeds."""
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        world = World(seed)
        world.run()
        counts += world.counts + Files.injected
    return counts
