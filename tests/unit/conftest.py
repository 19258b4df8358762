"""Fixtures of the unit tests: directories in real shared memory, cleaned up afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Times are never asserted: a busy machine is no failure.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture
def shm_path() -> Iterator[Path]:
    """An empty directory of this test's own on a tmpfs."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="snapshotd-test-", dir=shared if shared.is_dir() else None))
    yield path
    shutil.rmtree(path)
