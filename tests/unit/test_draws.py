"""A DataLoader goes on where it stood, with the very batches that it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from snapshotd_client import UnsupportedState, rng
from snapshotd_client.integrations.draws import Draws

BATCHES = 8


class Noisy(Dataset):
    def __len__(self) -> int:
        return 3 * BATCHES

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(np.random.rand()), torch.rand(()).item()


class Plain(Noisy):
    def __getitem__(self, index: int) -> int:
        return index


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def epoch(loader: DataLoader, ahead: int, used: int = 0) -> Iterator[Any]:
    """Batches as a loop that fetches ahead gets them, training on each with random numbers."""
    iterator = iter(loader)
    fetched: list[Any] = []
    for number in range(used, BATCHES):
        while len(fetched) <= ahead and len(fetched) < BATCHES - number:
            fetched.append(next(iterator))
        yield fetched.pop(0)
        torch.rand(7), np.random.rand(), random.random()


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "in order": lambda: DataLoader(Noisy(), 3),
    "own generator": lambda: DataLoader(Noisy(), 3, shuffle=True, generator=torch.Generator()),
    "weighted": lambda: DataLoader(
        Noisy(), 3, sampler=WeightedRandomSampler([1.0, 2.0, 3.0] * BATCHES, 3 * BATCHES)
    ),
    "batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), 3, drop_last=True)
    ),
    "workers": lambda: DataLoader(Plain(), 3, shuffle=True, num_workers=2),
}


def run(loader: DataLoader, ahead: int, epochs: int) -> list[str]:
    return [str(batch) for _ in range(epochs) for batch in epoch(loader, ahead)]


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("used", [0, 1, 5, 7])
@pytest.mark.parametrize("kind", [k for k in LOADERS if k != "workers"])
def test_goes_on_in_the_middle(kind: str, used: int, ahead: int) -> None:
    seed(1)
    reference = run(LOADERS[kind](), ahead, 3)
    seed(1)
    loader = LOADERS[kind]()
    draws = Draws(loader)
    got = run(loader, ahead, 1)
    batches = epoch(loader, ahead)
    for _ in range(used):
        got.append(str(next(batches)))
    next(batches)  # of the step that will not be done: here the snapshot is taken
    draws.used(used)
    state, generators = draws.state(used), rng.read()
    assert len(state["before"]) == min(ahead + 1, BATCHES - used)

    seed(2)
    torch.rand(100)
    loader = LOADERS[kind]()
    Draws(loader).resume(state, skip=True)
    batches = epoch(loader, ahead, used)
    got.append(str(next(batches)))
    rng.restore(generators)
    got += map(str, batches)
    got += run(loader, ahead, 1)
    assert got == reference


def test_with_workers() -> None:
    seed(1)
    reference = run(LOADERS["workers"](), 0, 1)
    seed(1)
    loader = LOADERS["workers"]()
    draws = Draws(loader)
    batches = epoch(loader, 0)
    got = [str(next(batches)) for _ in range(4)]
    state = draws.state(4)
    seed(2)
    loader = LOADERS["workers"]()
    Draws(loader).resume(state, skip=True)
    assert got + [str(b) for b in epoch(loader, 0, 4)] == reference


def test_following_changes_nothing() -> None:
    seed(1)
    reference = run(LOADERS["shuffled"](), 1, 2)
    seed(1)
    loader = LOADERS["shuffled"]()
    Draws(loader)
    assert run(loader, 1, 2) == reference
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert len(loader) == BATCHES


def test_a_stream_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(9))

    with pytest.raises(UnsupportedState, match=r"IterableDataset .*Stream"):
        Draws(DataLoader(Stream()))
