"""Real ranks, real daemons: state that ranks share is stored once, and comes back in any layout."""

from __future__ import annotations

import pytest

from tests.integration.layouts import run

#: Processes that import torch, several times: on a busy machine that alone takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_ddp_on_four_ranks_holds_a_quarter_each(cluster, tmp_path):
    nodes = cluster(parity=1, group_size=4).start(4)
    first = run(nodes, 4, "ddp", tmp_path, steps=2)
    assert [o.get("error") for o in first] == [None] * 4
    held = [f.stat().st_size for n in nodes for f in n.shm_dir.glob("slot-*/data-*.seg")]
    again = run(nodes, 4, "ddp", tmp_path, steps=0)
    assert [o["came back"] for o in again] == [first[0]["left"]] * 4
    whole = again[0]["restored"]["bytes_received"] * 4 / 3
    # A quarter, and beside it manifest, generators, room to grow.
    assert all(size < whole / 4 + 160_000 for size in held), (held, whole)


def test_into_fewer_ranks_and_another_parallelism_and_back(cluster, tmp_path):
    nodes = cluster(parity=1, group_size=4).start(4)
    first = run(nodes, 4, "ddp", tmp_path, steps=2)
    moved = run(nodes[:3], 3, "fsdp", tmp_path, steps=1)
    assert [o["came back"] for o in moved] == [first[0]["left"]] * 3
    for out in moved:
        restored = out["restored"]
        assert (restored["step"], restored["saved_world"], restored["rng"]) == (1, 4, "seeded")
        # What came over the network is what the overlap demands.
        assert restored["bytes_received"] <= 1.1 * restored["bytes_copied"] + 65_536
    back = run(nodes, 4, "ddp", tmp_path, steps=1)
    assert [o["came back"] for o in back] == [moved[0]["left"]] * 4


def test_into_another_layout_after_a_node_is_lost(cluster, tmp_path):
    nodes = cluster(parity=1, group_size=4, replace_s=600.0).start(4)
    first = run(nodes, 4, "fsdp", tmp_path, steps=2)
    nodes[3].lose()
    moved = run(nodes[:2], 2, "ddp", tmp_path, steps=1)
    assert [o.get("error") for o in moved] == [None] * 2
    assert [o["came back"] for o in moved] == [first[0]["left"]] * 2
    assert sum(o["restored"]["bytes_decoded"] for o in moved) > 0


def test_replicas_that_differ_are_a_fault_of_the_training(cluster, tmp_path):
    nodes = cluster(parity=1, group_size=2).start(2)
    out = run(nodes, 2, "ddp", tmp_path, steps=1, spoil=1)
    for each in out:
        name, text = each["error"]
        assert name == "ReplicasDiverged"
        assert "model.up.weight: ranks [1] differ from the rest of [0, 1]" in text


def test_another_model_is_refused_in_another_world(cluster, tmp_path):
    nodes = cluster(parity=1, group_size=3).start(3)
    run(nodes, 3, "fsdp", tmp_path, steps=1)
    for out in run(nodes[:2], 2, "fsdp", tmp_path, steps=1, width=131):
        name, text = out["error"]
        assert name == "StateMismatch"
        assert "model.up.weight: snapshot float32 [522, 130], this run float32 [526, 131]" in text
