"""Real text that every machine has, and batches of it: the Python standard library's sources."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

CORPUS_BYTES: Final = 4 << 20
VOCABULARY: Final = 256


def standard_library() -> Path:
    """The directory of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(directory: Path, limit_bytes: int = CORPUS_BYTES) -> bytes:
    """Concatenate the Python sources that lie directly in `directory`, in order of name.

    Args:
        directory: where the sources are; sub-directories (site-packages among them) are left out,
            so that what is installed beside the library does not change the text.
        limit_bytes: the text is cut here.

    Returns:
        At most `limit_bytes` bytes, the same on every call.

    Raises:
        FileNotFoundError: the directory holds no Python source.
    """
    text = bytearray()
    for path in sorted(directory.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    if not text:
        raise FileNotFoundError(
            f"no *.py file in {directory}; the demo trains on the standard library's sources, "
            "so run it with a Python that is installed as files, not as a zip archive"
        )
    return bytes(text[:limit_bytes])


class WindowLoader:
    """Endless batches of random windows of the text, each rank its own; resumable to the byte.

    The place of a window comes from a generator of the loader's own, which travels in
    `state_dict`; the noise comes from NumPy's and Python's global generators, which a snapshot
    must carry too if the run is to go on as it would have.
    """

    def __init__(self, text: bytes, *, context: int, batch: int, seed: int) -> None:
        if len(text) < context + 2:
            raise ValueError(f"a text of {len(text)} bytes has no window of {context + 1} bytes")
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._context = context
        self._batch = batch
        self._places = torch.Generator().manual_seed(seed)
        self._served = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both int64 of shape (batch, context); some inputs are noise."""
        last = self._text.numel() - self._context - 1
        starts = torch.randint(last + 1, (self._batch,), generator=self._places)
        offsets = starts[:, None] + torch.arange(self._context + 1)
        window = self._text[offsets].long()
        self._served += 1
        return _with_noise(window[:, :-1].clone()), window[:, 1:].contiguous()

    def state_dict(self) -> dict[str, int | Tensor]:
        return {"served": self._served, "places": self._places.get_state()}

    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        served, places = state["served"], state["places"]
        if not isinstance(served, int) or not isinstance(places, Tensor):
            raise TypeError(f"a loader's state is an int and a tensor, not {served!r}, {places!r}")
        self._served = served
        self._places.set_state(places)


def _with_noise(tokens: Tensor) -> Tensor:
    """Overwrite one token of each row in place: where says NumPy, with what says Python."""
    rows, columns = tokens.shape
    for row, column in enumerate(np.random.randint(columns, size=rows)):
        tokens[row, int(column)] = random.randrange(VOCABULARY)  # noqa: S311 - noise, not a secret
    return tokens
