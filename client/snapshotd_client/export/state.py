"""A whole state, by name, whatever ranks it is from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from snapshotd_client.boxes import Box

#: A path in the nested state, as torch.distributed.checkpoint keeps it.
Keys = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Piece:
    """A box of a tensor: a shard that has it, or some of it, and how to get it."""

    shard: int
    box: Box
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A global tensor: pieces that together are all of it, none overlapping."""

    name: str
    path: Keys
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Piece]

    def put(self, target: torch.Tensor) -> None:
        """Copy all of it into a tensor of its shape."""
        for piece in self.pieces:
            offset, shape = piece.box
            place = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            target[place].copy_(piece.load())

    def whole(self) -> torch.Tensor:
        """All of it; must only be read."""
        if len(self.pieces) == 1:
            return self.pieces[0].load()
        made = torch.empty(self.shape, dtype=self.dtype)
        self.put(made)
        return made


@dataclass(frozen=True, eq=False)
class Thing:
    """What is no tensor: a number, a list, an object of the user's."""

    name: str
    path: Keys
    shard: int
    value: object


@dataclass(frozen=True, eq=False)
class State:
    """The whole state of a job at a step.

    Attributes:
        diverged: names of tensors that are the same box in several shards, with other bytes.
    """

    job: str
    step: int
    world: int
    tensors: Sequence[Tensor]
    things: Sequence[Thing]
    diverged: Sequence[str]
