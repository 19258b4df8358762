"""Messages of a megabyte do not cost page faults each time."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from snapshotd.memory.heap import keep_freed
kept = keep_freed() if sys.argv[1] == "kept" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def rounds(count):
    for _ in range(count):
        messages = [bytes(bytearray(3 << 20)) for _ in range(3)]
        del messages
rounds(3)
before = faults()
rounds(20)
print(kept, faults() - before)
"""


def faults(how: str) -> tuple[str, int]:
    said = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    ).stdout.split()
    return said[0], int(said[1])


def test_what_is_freed_is_used_again() -> None:
    kept, few = faults("kept")
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    _, many = faults("not")
    assert few * 10 < many
