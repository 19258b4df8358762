"""The demo's text and its loader: the same bytes every time, resumable in the middle."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from snapshotd_client.demo.corpus import WindowLoader, read_corpus, standard_library

TEXT = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def _own_generators():
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


def _loader(seed: int = 1) -> WindowLoader:
    return WindowLoader(TEXT, context=16, batch=3, seed=seed)


def _seed() -> None:
    random.seed(5)
    np.random.seed(5)


def test_corpus_is_sources_in_order_of_name_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_bytes(b"second")
    (tmp_path / "a.py").write_bytes(b"first ")
    (tmp_path / "c.txt").write_bytes(b"no source")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "a.py").write_bytes(b"not the library's")
    assert read_corpus(tmp_path) == b"first second"


def test_corpus_is_bounded(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.py").write_bytes(name.encode() * 10)
    assert read_corpus(tmp_path, limit_bytes=15) == b"a" * 10 + b"b" * 5


def test_this_machine_has_the_text() -> None:
    text = read_corpus(standard_library(), limit_bytes=1 << 20)
    assert len(text) == 1 << 20
    assert text == read_corpus(standard_library(), limit_bytes=1 << 20)


def test_directory_without_sources_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="installed as files"):
        read_corpus(tmp_path)


def test_targets_are_the_next_bytes_but_for_the_noise() -> None:
    tokens, targets = _loader().next_batch()
    assert tokens.shape == targets.shape == (3, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    differing = (tokens[:, 1:] != targets[:, :-1]).sum(dim=1)
    assert differing.max() <= 1


def test_same_seeds_give_the_same_batches() -> None:
    _seed()
    first = [_loader().next_batch()[0] for _ in range(2)]
    _seed()
    again = [_loader().next_batch()[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(_loader(seed=2).next_batch()[1], _loader(seed=3).next_batch()[1])


def test_loader_goes_on_from_its_state() -> None:
    loader = _loader()
    loader.next_batch()
    state = loader.state_dict()
    _seed()
    expected = loader.next_batch()
    other = _loader(seed=99)
    other.load_state_dict(state)
    _seed()
    found = other.next_batch()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert other.state_dict()["served"] == 2


def test_each_generator_matters() -> None:
    """A snapshot without Python's or NumPy's generator would give other batches."""
    _seed()
    expected = _loader().next_batch()[0]
    for reseed in (random.seed, np.random.seed):
        _seed()
        reseed(6)
        assert not torch.equal(_loader().next_batch()[0], expected)


def test_loader_refuses_what_is_no_state() -> None:
    with pytest.raises(TypeError, match="an int and a tensor"):
        _loader().load_state_dict({"served": 1, "places": 2})


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="no window of 17 bytes"):
        WindowLoader(b"short", context=16, batch=1, seed=0)
