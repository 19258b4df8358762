"""Everything that is fuzzed, by name."""

from __future__ import annotations

from tests.fuzz.harness import Target
from tests.fuzz.targets import blocks, facts, files, manifest, segments, trainers, transfers

TARGETS: dict[str, Target] = {
    target.name: target
    for room in (facts, segments, files, blocks, transfers, trainers, manifest)
    for target in room.TARGETS
}
