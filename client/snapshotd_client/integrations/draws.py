"""Where a DataLoader stands, and with which random states it drew: so that it draws again the same.

A loader's batches depend on the generators as they were when its epoch began (the order) and when
each batch was fetched (random transforms and collators). Loops fetch ahead of what they train on.
So position and random states are noted where every fetch passes: at the batch sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypedDict, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

from snapshotd_client import rng
from snapshotd_client.errors import StateMismatch, UnsupportedState

_OWNER: Final = "_snapshotd_draws"


class DrawsState(TypedDict):
    """A position within an epoch: `used` batches are trained on.

    `start` and `generators` are as the epoch began; `before` as the fetches of batches that are not
    used yet began, by their number.
    """

    used: int
    start: Any
    generators: dict[str, bytes]
    before: dict[int, Any]


class Draws:
    """Follows the draws of one DataLoader, through all its epochs.

    Args:
        loader: a plain DataLoader over a dataset with an index; its batch sampler (or sampler,
            where it does not batch) is given a class that notes its draws. Iterators that were
            made before are not followed.

    Raises:
        UnsupportedState: the loader's position cannot be found again.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise UnsupportedState(
                f"the training DataLoader draws from an IterableDataset ({_kind(loader.dataset)}), "
                "which cannot be entered in the middle",
                "Use a dataset with an index, or a loop of your own with torchdata's "
                "StatefulDataLoader among the states of Snapshotter (docs/trainers.md).",
            )
        if type(loader).__module__.partition(".")[0] == "torchdata":
            raise UnsupportedState(
                "the training DataLoader is a StatefulDataLoader, whose own idea of its position "
                "is ahead of what was trained on",
                "Use torch's DataLoader here: its position is kept without help.",
            )
        batches = loader.batch_sampler is not None
        self._sampler: Any = loader.batch_sampler if batches else loader.sampler
        # Fetched in the main process: then its generators count.
        self._fetches_here = loader.num_workers == 0
        self._generators = dict(_generators(loader))
        self._start: Any = None
        self._start_generators: dict[str, bytes] = {}
        self._before: dict[int, Any] = {}
        self._drawn = 0
        self._replay: DrawsState | None = None
        self._skip = False
        _follow(self._sampler, self)

    def used(self, count: int) -> None:
        """Say that the first `count` batches of the epoch are trained on."""
        for number in [n for n in self._before if n < count]:
            del self._before[number]

    def state(self, used: int) -> DrawsState:
        """The position after `used` batches of this epoch."""
        return DrawsState(
            used=used,
            start=self._start,
            generators=dict(self._start_generators),
            before={n: state for n, state in self._before.items() if n >= used},
        )

    def resume(self, state: DrawsState, *, skip: bool) -> None:
        """Have the next iteration go on at `state`, and draw what was drawn.

        Args:
            state: as `state` gave it.
            skip: whether to leave out the batches that were used; else the loop itself does.
        """
        missing = state["generators"].keys() - self._generators.keys()
        if missing:
            raise StateMismatch(
                [f"the generator {name} of the training DataLoader is gone" for name in missing]
            )
        self._replay, self._skip = state, skip

    def indices(self, begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """What the sampler gives from `begin()` on, followed; for the class made here."""
        replay, self._replay = self._replay, None
        used = replay["used"] if replay else 0
        before = dict(replay["before"]) if replay else {}
        if replay is not None and replay["start"] is not None:
            rng.restore(_unpacked(replay["start"]))
            for name, state in replay["generators"].items():
                self._generators[name].set_state(_tensor(state))
        self._start = _packed()
        self._start_generators = {n: _bytes(g.get_state()) for n, g in self._generators.items()}
        self._before = {}
        self._drawn = 0
        iterator = begin()
        if self._skip and replay is not None:
            while self._drawn < used and next(iterator, None) is not None:
                self._drawn += 1
        for index in iterator:
            if self._drawn in before:
                rng.restore(_unpacked(before[self._drawn]))
            if self._fetches_here and self._drawn >= used:
                self._before[self._drawn] = _packed()
            self._drawn += 1
            yield index


def _follow(sampler: Any, draws: Draws) -> None:
    base = type(sampler)
    if not hasattr(sampler, _OWNER):
        # As `iter` looks at the class, and the sampler itself is known to many.
        sampler.__class__ = type(
            base.__name__,
            (base,),
            {
                "__iter__": lambda self: getattr(self, _OWNER).indices(lambda: base.__iter__(self)),
                "__module__": base.__module__,
            },
        )
    setattr(sampler, _OWNER, draws)


def _generators(loader: DataLoader[Any]) -> Iterator[tuple[str, torch.Generator]]:
    """Generators that loader and samplers own, by where they are."""
    found: dict[int, str] = {}
    owners: list[tuple[str, object]] = [("loader", loader)]
    for place, owner in owners:
        for name in ("sampler", "batch_sampler"):
            inner = getattr(owner, name, None)
            if inner is not None and len(owners) < 8:
                owners.append((f"{place}.{name}", inner))
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in found:
            found[id(generator)] = place
            yield place, generator


def _packed() -> Any:
    # Without tensors: a snapshot's layout should not change with how far a loop fetches ahead.
    state = rng.read()
    return {**state, "torch": _bytes(state["torch"])}


def _unpacked(state: Any) -> rng.RngState:
    return cast("rng.RngState", {**state, "torch": _tensor(state["torch"])})


def _bytes(state: torch.Tensor) -> bytes:
    return bytes(state.numpy())


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
