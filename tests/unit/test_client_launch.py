"""Ranks of one start of a job share a name that those of another start do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from snapshotd_client.launch import this_launch


@pytest.fixture
def start() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("start")
def test_all_who_share_the_store_of_a_process_group_share_the_name() -> None:
    name = this_launch()
    assert name
    assert this_launch() == name, "who comes later finds the name that is there"
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert this_launch() not in {"", name}


def test_without_a_process_group_no_name_is_guessed() -> None:
    assert this_launch() == ""
