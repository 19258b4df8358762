"""Real ranks, real daemons: state that ranks share is stored once, and comes back in any layout."""

from __future__ import annotations

import pytest

from tests.integration.cluster import Cluster
from tests.integration.layouts import run


@pytest.fixture
def cluster():
    made = Cluster(parity=1)
    yield made
    made.close()


def test_ddp_on_four_ranks_holds_a_quarter_each(cluster, tmp_path):
    nodes = cluster.start(4)
    first = run(nodes, 4, "ddp", tmp_path, steps=2)
    held = [f.stat().st_size for n in nodes for f in n.shm_dir.glob("slot-*/*.seg")]
    print(held, [o.get("error") for o in first])
    again = run(nodes, 4, "ddp", tmp_path, steps=1)
    print(again[0]["restored"], again[0].get("error"))
    assert [o["came back"] for o in again] == [first[0]["left"]] * 4
