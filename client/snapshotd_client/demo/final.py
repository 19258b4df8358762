"""The final state as bytes with names: written by each rank, compared by the demo."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Difference:
    """The first byte in which two final states differ."""

    name: str
    offset: int
    what: str

    def __str__(self) -> str:
        return f"{self.name}, byte {self.offset}: {self.what}"


@dataclass(frozen=True)
class Comparison:
    """Bytes looked at in each of the two states, and the first difference if there is one."""

    compared_bytes: int
    difference: Difference | None


def write_final(path: Path, parts: Iterable[tuple[str, bytes]]) -> None:
    """Write named byte strings to `path`, and where each begins to `path` with suffix .json."""
    index: list[tuple[str, int]] = []
    with open(path, "wb") as file:
        for name, content in parts:
            index.append((name, file.tell()))
            file.write(content)
    path.with_suffix(".json").write_text(json.dumps(index), encoding="utf-8")


def named_parts(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings and sequences, each with its path, in the value's own order."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from named_parts(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from named_parts(inner, f"{name}[{position}]")
    else:
        yield name, value


def compare_final(reference: Path, other: Path) -> Comparison:
    """Compare two files of `write_final`, every byte.

    Raises:
        FileNotFoundError: one of them was never written.
    """
    ours, theirs = reference.read_bytes(), other.read_bytes()
    if ours == theirs:
        return Comparison(len(ours), None)
    index = json.loads(reference.with_suffix(".json").read_text(encoding="utf-8"))
    return Comparison(min(len(ours), len(theirs)), _first_difference(index, ours, theirs))


def _first_difference(index: list[tuple[str, int]], ours: bytes, theirs: bytes) -> Difference:
    pairs = enumerate(zip(ours, theirs, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    # The last one that begins there: those before it at the same place are empty.
    name, begin = [part for part in index if part[1] <= place][-1]
    if place == min(len(ours), len(theirs)):
        what = f"the reference has {len(ours)} bytes, this run {len(theirs)}"
    else:
        what = f"{ours[place]:#04x} in the reference, {theirs[place]:#04x} in this run"
    return Difference(name, place - begin, what)
