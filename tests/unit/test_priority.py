"""An SMP leaves its trainer's processors to it, and training comes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.core.cpus import away_from
from snapshotd.wire.cpus import parse_cpus

cpus = st.frozensets(st.integers(0, 15), min_size=1)


def test_a_list_is_read_as_the_kernel_writes_it() -> None:
    assert parse_cpus("0-3, 8,10-10") == {0, 1, 2, 3, 8, 10}
    for wrong in ("", "a", "3-1", "1-", "-1", "0,,2", "0-99999"):
        with pytest.raises(ValueError, match=r"neither|does not rise"):
            parse_cpus(wrong)


def test_it_stays_on_the_trainers_numa_node_and_off_its_processors() -> None:
    machine, nodes = frozenset(range(8)), [frozenset(range(4)), frozenset(range(4, 8))]
    assert away_from({4, 5}, machine, nodes) == {6, 7}
    assert away_from(nodes[1], machine, nodes) == nodes[0], "its own node is all the trainer's"
    assert away_from({1}, machine, []) == machine - {1}, "the kernel tells of no nodes"
    assert away_from(machine, machine, nodes) == machine, "it is not pinned"


@given(cpus, cpus, st.lists(cpus))
def test_there_is_always_a_processor_that_may_be_used(
    trainer: frozenset[int], allowed: frozenset[int], nodes: list[frozenset[int]]
) -> None:
    chosen = away_from(trainer, allowed, nodes)
    assert chosen
    assert chosen <= allowed
    assert not chosen & trainer or not allowed - trainer


_PROGRAM = """
import json, os, sys, threading
from snapshotd.flow.priority import Priority
before, allowed = os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0))
priority = Priority(3, sys.argv[1])
stop, started = threading.Event(), threading.Event()
def other():
    started.set()
    stop.wait()
thread = threading.Thread(target=other)
thread.start()
started.wait()
priority.beside(frozenset(allowed[:1]))
found = [sorted(os.sched_getaffinity(t)) for t in (os.getpid(), thread.native_id)]
nice = os.getpriority(os.PRIO_PROCESS, thread.native_id) - before
stop.set()
print(json.dumps([nice, allowed, *found]))
"""


@pytest.mark.parametrize("wanted", ["auto", "all", "0"])
def test_every_thread_of_the_process_stands_back(wanted: str) -> None:
    if wanted == "0" and 0 not in os.sched_getaffinity(0):
        pytest.skip("this process may not use processor 0")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, wanted], capture_output=True, text=True, check=True
    )
    nice, allowed, main, other = json.loads(done.stdout)
    expected = {"auto": allowed[1:] or allowed, "all": allowed, "0": [0]}[wanted]
    assert (nice, main, other) == (3, expected, expected)
