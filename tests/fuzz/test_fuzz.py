"""The short profile: every input that ever failed, and the same fresh ones each time."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.catalogue import TARGETS
from tests.fuzz.harness import Target, explore, kept, pack, unpack

#: What one input, of some kilobytes, may make the daemon hold at most, beside mapped segments.
HELD_BYTES = 24 << 20
START = 20_240


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("path", kept(), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_what_once_failed(path: Path) -> None:
    target, parts = TARGETS[path.parent.name], unpack(path.read_bytes())
    target.run(parts)  # what it loads and keeps for good is not the input's
    tracemalloc.start()
    try:
        target.run(parts)
        assert tracemalloc.get_traced_memory()[1] < HELD_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_anything(target: Target) -> None:
    found = explore(target, target.weight, START)
    if found.error is not None:
        pytest.fail(f"{target.name} failed on {pack(found.failing)!r}: {found.error!r}")
    assert found.examples >= target.weight // 2


def test_the_harness_finds_a_bug() -> None:
    def breaks(parts: object) -> None:
        assert len(list(parts)) != 2  # type: ignore[call-overload]

    target = Target("broken", TARGETS["header"].inputs.map(lambda p: [*p, *p]), breaks)
    found = explore(target, 20, START)
    assert isinstance(found.error, AssertionError)
    assert unpack(pack(found.failing)) == found.failing
