"""Real ranks of gloo leave images in one layout and come back from them in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Four processes that import torch, several times: on a busy machine that alone takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RANK = Path(__file__).with_name("client_layout_rank.py")


def run(kind, world, folder, old="-", alone=-1):
    """All ranks to their end; what each says. Rank `alone` divides nothing with others."""
    folder.mkdir()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", RANK, *map(str, (rank, world)), kind,
             folder / "store", old, folder, str(alone)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        texts = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    outs = [folder / f"{rank}.out" for rank in range(world)]
    assert all(out.exists() for out in outs), "\n".join(texts)
    return [json.loads(out.read_text()) for out in outs]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """What four ranks of DDP leave after two steps, and how it goes on undisturbed."""
    folder = tmp_path_factory.mktemp("layouts")
    first = run("ddp", 4, folder / "first")
    again = run("ddp", 4, folder / "again", folder / "first")
    return folder, first, again


def test_ddp_comes_back_from_shares(ddp):
    folder, first, again = ddp
    assert [o["came back"] for o in again] == [first[0]["left"]] * 4
    assert [o["asked"] for o in again] == [0] * 4  # by an exchange, without the daemon
    sizes = [(folder / "first" / f"{r}.image").stat().st_size for r in range(4)]
    received = again[0]["restored"]["bytes_received"]
    whole = received * 4 / 3
    # A share, and beside it manifest, generators and the like.
    assert all(size < whole / 4 + 48_000 for size in sizes), (sizes, whole)


def test_a_rank_that_stored_all_of_its_own_does_not_hinder_the_others(tmp_path):
    """It came late to agree, or found other tensors: nobody can have a share from it."""
    first = run("ddp", 2, tmp_path / "first", alone=1)
    sizes = [(tmp_path / "first" / f"{rank}.image").stat().st_size for rank in range(2)]
    assert sizes[0] < 0.6 * sizes[1]
    again = run("ddp", 2, tmp_path / "again", tmp_path / "first")
    assert [o["came back"] for o in again] == [first[0]["left"]] * 2
    assert [o["restored"]["rng"] for o in again] == ["restored"] * 2


MOVES = [("fsdp", 3), pytest.param("hsdp", 4, marks=pytest.mark.extended), ("tp", 2)]


@pytest.mark.parametrize(("kind", "world"), MOVES)
def test_it_comes_back_in_another_layout_and_goes_on_alike(ddp, tmp_path, kind, world):
    folder, first, again = ddp
    moved = run(kind, world, tmp_path / "moved", folder / "first")
    assert [o["came back"] for o in moved] == [first[0]["left"]] * world
    for out in moved:
        assert out["restored"]["saved_world"] == 4
        assert out["restored"]["rng"] == ("restored" if world == 4 else "seeded")
        assert out["losses"] == pytest.approx(again[0]["losses"], rel=1e-3)
    back = run("ddp", 4, tmp_path / "back", tmp_path / "moved")
    assert [o["came back"] for o in back] == [moved[0]["left"]] * 4


@pytest.mark.extended
def test_more_ranks_than_saved_it_take_it_up(ddp, tmp_path):
    folder, first, again = ddp
    six = run("fsdp", 6, tmp_path / "six", folder / "first")
    assert [o["came back"] for o in six] == [first[0]["left"]] * 6
    assert all(o["losses"] == pytest.approx(again[0]["losses"], rel=1e-3) for o in six)
    eight = run("hsdp", 8, tmp_path / "eight", tmp_path / "six")
    assert [o["came back"] for o in eight] == [six[0]["left"]] * 8
    assert {o["restored"]["saved_world"] for o in eight} == {6}
