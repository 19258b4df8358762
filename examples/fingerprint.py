"""What two runs that are the same have in common: where they begin, and every byte of their end."""

import hashlib
import random
from collections.abc import Iterable

import numpy as np
import torch
from torch.distributed.tensor import DTensor


def seed(number: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def fingerprint(*states: object) -> str:
    """SHA-256 over the tensors and values of state dicts, and over the random generators."""
    digest = hashlib.sha256()
    generators = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    for piece in _pieces((states, generators)):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(state: object) -> Iterable[bytes]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield repr(key).encode()
            yield from _pieces(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _pieces(value)
    elif isinstance(state, torch.Tensor):
        local = state.to_local() if isinstance(state, DTensor) else state
        yield local.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(state, np.ndarray):
        yield state.tobytes()
    else:
        yield repr(state).encode()
