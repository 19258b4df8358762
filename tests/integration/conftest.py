from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.integration.cluster import Cluster, Node
from tests.integration.steady import Steady


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes clusters, and removes all that is left of them."""
    made: list[Cluster] = []

    def make(**settings: object) -> Cluster:
        made.append(Cluster(**settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def world() -> Iterator[Steady]:
    """Made once, for all tests that misbehave beside it."""
    cluster = Cluster(group_size=2)
    try:
        steady = Steady(cluster)
        yield steady
        steady.close()
    finally:
        cluster.close()


@pytest.fixture
def steady(world: Steady) -> Iterator[Steady]:
    """After the test the very same processes still serve, and the job trains and protects."""
    yield world
    world.check()


@pytest.fixture
def node(steady: Steady) -> Node:
    return steady.nodes[0]
