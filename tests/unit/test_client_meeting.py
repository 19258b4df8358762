"""Ranks that meet are told the same of it, also where one of them comes late."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from snapshotd_client.meeting import Meeting


@pytest.mark.parametrize("kind", ["hash", "tcp", "file"])
def test_a_late_rank_hears_that_the_others_wait_no_longer(monkeypatch, tmp_path, kind):
    if kind == "tcp":
        first = dist.TCPStore("127.0.0.1", 0, is_master=True)
        stores = [first, dist.TCPStore("127.0.0.1", first.port)]
    else:
        stores = [
            dist.HashStore() if kind == "hash" else dist.FileStore(str(tmp_path / "s"), 2)
        ] * 2

    def meet(topic, rank, word, timeout_s):
        meeting = Meeting(topic, (0, 1))
        meeting._store = stores[rank]
        return meeting.all_alike(word, timeout_s)

    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: None)
    assert meet("late", 0, b"a", 0.01) is None
    assert meet("late", 1, b"a", 30.0) is None
    with ThreadPoolExecutor() as pool:
        for topic, words, alike in (("same", b"aa", True), ("other", b"ab", False)):
            told = pool.map(lambda i: meet(topic, i, words[i : i + 1], 30.0), (0, 1))  # noqa: B023
            assert list(told) == [alike, alike]
