"""The figures for thousands of nodes come from a snapshot that the board really commits."""

from __future__ import annotations

import pytest

from tests.sim import scale


@pytest.mark.parametrize("nodes", [8, 27])
def test_a_snapshot_is_committed_and_every_message_counted(nodes: int) -> None:
    outcome = scale.measure(nodes, samples=4)
    assert nodes - 1 < outcome.messages <= nodes - 1 + 2 * scale.GROUP
    assert outcome.network_s <= outcome.batched_s <= outcome.each_s
    assert 0 < outcome.message_bytes < outcome.whole_bytes
