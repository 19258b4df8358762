"""The comparison of final states: every byte, and the name of the first that differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotd_client.demo.final import compare_final, named_parts, write_final

PARTS = [("weights", b"\x01\x02\x03"), ("empty", b""), ("step", b"17"), ("rng", b"\x00" * 4)]


def _written(path: Path, parts: list[tuple[str, bytes]]) -> Path:
    write_final(path, parts)
    return path


def test_equal_states(tmp_path: Path) -> None:
    one, other = _written(tmp_path / "a.bin", PARTS), _written(tmp_path / "b.bin", PARTS)
    result = compare_final(one, other)
    assert result.difference is None
    assert result.compared_bytes == 9


@pytest.mark.parametrize("place", range(9))
def test_any_single_byte_that_differs_is_named(tmp_path: Path, place: int) -> None:
    one, other = _written(tmp_path / "a.bin", PARTS), _written(tmp_path / "b.bin", PARTS)
    content = bytearray(other.read_bytes())
    content[place] ^= 0x80
    other.write_bytes(content)
    difference = compare_final(one, other).difference
    assert difference is not None
    owner = ["weights"] * 3 + ["step"] * 2 + ["rng"] * 4
    assert difference.name == owner[place]
    assert difference.offset == place - owner.index(owner[place])
    assert "in the reference" in str(difference)


def test_a_state_that_is_cut_short_differs(tmp_path: Path) -> None:
    one, other = _written(tmp_path / "a.bin", PARTS), _written(tmp_path / "b.bin", PARTS[:-1])
    difference = compare_final(one, other).difference
    assert difference is not None
    assert "the reference has 9 bytes, this run 5" in str(difference)


def test_a_state_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        compare_final(_written(tmp_path / "a.bin", PARTS), tmp_path / "b.bin")


def test_leaves_have_paths() -> None:
    state = {"optimizer": {"groups": [{"lr": 0.1}], 0: None}, "rng": (3, (4, 5))}
    assert list(named_parts(state)) == [
        ("optimizer.groups[0].lr", 0.1),
        ("optimizer.0", None),
        ("rng[0]", 3),
        ("rng[1][0]", 4),
        ("rng[1][1]", 5),
    ]
