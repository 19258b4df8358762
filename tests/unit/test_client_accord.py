"""When ranks compare what they all hold; client_replica_rank.py shows that they find it out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snapshotd_client import accord
from snapshotd_client.accord import Accord, Shared
from snapshotd_client.errors import ReplicasDiverged
from snapshotd_client.extents import Extent
from snapshotd_client.identity import Identity

WHO = Identity("job", "job", 0, 0, 4, 0, Path())


def piece(ranks):
    storage = torch.arange(8.0).untyped_storage()
    return Shared(ranks, f"of {ranks}", Extent(storage, 0, storage.nbytes()))


@pytest.fixture
def answers(monkeypatch):
    """What the next meetings come to, in turn; where they were."""

    class Meeting:
        coming, came = [], []

        def __init__(self, topic, ranks):
            self.came.append((topic.rpartition("/")[2], ranks))

        def all_alike(self, word, timeout_s):
            return self.coming.pop(0)

        def tell(self, rank, words, timeout_s):
            return None

    monkeypatch.setattr(accord, "Meeting", Meeting)
    monkeypatch.setattr(accord, "can_meet", lambda *_: True)
    return Meeting


def test_a_first_comparison_that_not_all_came_to_is_tried_again(answers):
    shared, this = [piece((0, 1)), piece((0, 2))], Accord(WHO)
    answers.coming[:] = [True, None, None, False]
    this.check(5, 1, shared)
    this.check(6, 2, shared)
    with pytest.raises(ReplicasDiverged, match="step 7"):
        this.check(7, 3, shared)
    assert answers.came == [("5", (0, 1)), ("5", (0, 2)), ("6", (0, 2)), ("7", (0, 2))]


def test_it_is_tried_three_times_and_at_every_nth_snapshot(answers):
    this = Accord(WHO, check_every=10)
    answers.coming[:] = [None] * 4
    for number in range(1, 11):
        this.check(number, number, [piece((0, 1))])
    assert [step for step, _ in answers.came] == ["1", "2", "3", "10"]
