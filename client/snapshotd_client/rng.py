"""Reads and sets the states of the process-wide random generators."""

from __future__ import annotations

import hashlib
import random
import sys
from array import array
from collections.abc import Iterable
from typing import Any, Final, TypedDict, cast

import torch

#: Of Python's generator: unsigned, 32 bit.
_WORD: Final = "I"


class RngState(TypedDict):
    """States as their libraries give them, but for Python's, whose words stand in one piece.

    `numpy` is None where the process had not imported NumPy; `cuda` pairs a device index with
    its state, the current device first.
    """

    python: tuple[int, bytes, float | None]
    numpy: object
    torch: torch.Tensor
    cuda: list[tuple[int, torch.Tensor]]


def read(cuda_devices: Iterable[int] = ()) -> RngState:
    """The states of Python, NumPy's global generator, torch's CPU and the given CUDA devices."""
    numpy = sys.modules.get("numpy")
    return RngState(
        python=_packed(random.getstate()),
        numpy=numpy.random.get_state() if numpy else None,
        torch=torch.get_rng_state(),
        cuda=[(i, torch.cuda.get_rng_state(i)) for i in _current_first(cuda_devices)],
    )


def restore(state: RngState, cuda_devices: Iterable[int] = ()) -> None:
    """Set every generator of `state`.

    The process may see its devices under other indices than the one that wrote the snapshot, so
    where the counts agree, states are matched by position: current device first, then ascending.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(array(_WORD, words)), gauss))
    if state["numpy"] is not None:
        import numpy as np  # noqa: PLC0415  # only where the snapshot has a state for it

        np.random.set_state(cast("Any", state["numpy"]))  # restored, not used
    torch.set_rng_state(state["torch"].cpu())
    here = _current_first(cuda_devices)
    saved = state["cuda"]
    indices = here if len(here) == len(saved) else [index for index, _ in saved]
    for index, (_, generator_state) in zip(indices, saved, strict=True):
        torch.cuda.set_rng_state(generator_state.cpu(), index)


def seed(text: str) -> None:
    """Seed every generator of this process from a text: equal texts, equal numbers."""
    digest = hashlib.sha256(text.encode()).digest()
    random.seed(digest)
    numpy = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(int.from_bytes(digest[:4], "little"))
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


def _packed(state: tuple[Any, ...]) -> tuple[int, bytes, float | None]:
    # As 625 numbers it would take longer to look through than many a model.
    version, words, gauss = state
    return version, array(_WORD, words).tobytes(), gauss


def _current_first(devices: Iterable[int]) -> list[int]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types here
        return []
    current = torch.cuda.current_device()
    return [current, *sorted(set(devices) - {current})]
