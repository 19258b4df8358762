from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.integration.cluster import Cluster


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
