"""What a fuzz target is, how it is explored, and how its inputs are kept.

An input is a list of byte strings ("parts"): one message, the messages of a stream, the frames of
a socket, the bytes of a file. So every input that ever failed is a small file of the corpus,
whatever strategy had made it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

CORPUS = Path(__file__).parent / "corpus"
_LENGTH = struct.Struct("<I")

Parts = Sequence[bytes]


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
        inputs: how inputs are made.
        run: raises nothing, whatever it is given; an exception is a bug.
        weight: examples of the short profile.
    """

    name: str
    inputs: SearchStrategy[list[bytes]]
    run: Callable[[Parts], None]
    weight: int = 100


@dataclass(slots=True)
class Found:
    """What an exploration has come to."""

    examples: int = 0
    failing: list[bytes] = field(default_factory=list)
    error: BaseException | None = None


def explore(target: Target, examples: int, start: int, *, shrink: bool = True) -> Found:
    """Run a target on `examples` inputs that follow from `start`; the first bug ends it.

    With `shrink` the failing input is made as small as hypothesis can.
    """
    found = Found()

    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
    )
    @given(target.inputs)
    def once(parts: list[bytes]) -> None:
        found.examples += 1
        try:
            target.run(parts)
        except BaseException as error:
            found.failing, found.error = list(parts), error
            raise

    try:
        once()
    except BaseException as error:  # whatever it is, it is the finding
        if isinstance(error, KeyboardInterrupt):
            raise
        found.error = found.error or error
    return found


def pack(parts: Parts) -> bytes:
    """Parts as one corpus file."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def unpack(data: bytes) -> list[bytes]:
    """The parts of a corpus file."""
    parts, at = [], 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        parts.append(data[at : at + length])
        at += length
    return parts


def keep(target: str, parts: Parts, corpus: Path = CORPUS) -> Path:
    """Add an input to the corpus; returns its file."""
    data = pack(parts)
    path = corpus / target / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def kept() -> list[Path]:
    """All files of the corpus."""
    return sorted(path for path in CORPUS.glob("*/*") if path.is_file())
