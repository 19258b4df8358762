"""Damage to real segments of a node, as failing memory does it."""

from __future__ import annotations

import mmap
from pathlib import Path

from snapshotd.memory.segment import Segment
from tests.integration.cluster import Node
from tests.integration.ranks import segment_files


def committed_file(node: Node, kind: str) -> Path:
    """The sealed segment of a kind with the newest step."""
    found: dict[int, Path] = {}
    for path in segment_files(node):
        segment = Segment.open(path)
        if segment.state.name == "SEALED" and path.name.startswith(kind):
            found[segment.header.version.step] = path
        segment.close()
    assert found, f"{node.name} holds no sealed {kind}"
    return found[max(found)]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[offset] ^= 0x10
