"""Job records: what a daemon knows again after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from snapshotd.errors import SnapshotdError
from snapshotd.flow.records import Records
from snapshotd.metadata import Decision, DecisionId, Group, Home, JobFacts, Member, Version

HOMES = tuple(Member(i, Home(name, 0)) for i, name in enumerate("ab"))
DECISION = Decision(DecisionId(7, "a"), "a/job", 2, (Group(HOMES, 1),), ("x", "y"))
FACTS = JobFacts("a/job", 2, 7, 7, Version(7, 0), 7, DECISION)


def kept(directory: Path, *facts: JobFacts) -> list[JobFacts]:
    """What the next daemon knows."""
    records = Records(directory)
    assert records.load() == []
    for each in facts:
        records.keep([each])
    assert not list(directory.glob("*.half"))
    return Records(directory).load()


def test_the_newest_restore_point_is_known_after_a_restart(tmp_path: Path) -> None:
    newer = replace(FACTS, committed=Version(7, 41))
    assert kept(tmp_path, FACTS, newer) == [newer]


def test_a_point_of_an_older_lineage_does_not_come_back(tmp_path: Path) -> None:
    """A crash between the two files: the record is of the new lineage, the point of the old."""
    older = replace(FACTS, committed=Version(7, 41))
    kept(tmp_path, FACTS, older)
    point = next(tmp_path.glob("*.point")).read_bytes()
    decision = replace(DECISION, id=DecisionId(9, "a"))
    began = replace(FACTS, epoch=9, lineage=9, committed=None, committed_in=0, decision=decision)
    Records(tmp_path).keep([began])
    next(tmp_path.glob("*.point")).write_bytes(point)
    assert Records(tmp_path).load() == [began]


def test_a_job_that_is_forgotten_leaves_no_file(tmp_path: Path) -> None:
    records = Records(tmp_path)
    other = replace(FACTS, job="other", decision=None)
    records.keep([FACTS, other])
    records.keep([other])
    assert Records(tmp_path).load() == [other]
    assert {p.suffix for p in tmp_path.iterdir()} == {".job", ".point"}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_point_is_an_error_that_names_it(tmp_path: Path) -> None:
    kept(tmp_path, FACTS)
    point = next(tmp_path.glob("*.point"))
    point.write_bytes(b"\xff\xff")
    with pytest.raises(SnapshotdError, match=r"\.point is damaged"):
        Records(tmp_path).load()
