"""What must outlive all memory: that a job once had a restore point, and in which epoch it is.

Two files a job in the state directory. The record, with the decision, is written and flushed to
the disk when a job's epoch or lineage changes and at the first commit of a lineage. The restore
point alone is a few bytes and is written at every commit, for the next daemon of this machine and
not for a power cut, which takes the memory as well: so it is not flushed.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from google.protobuf.message import DecodeError

from snapshotd.core.commit import merge
from snapshotd.errors import RequestError, SnapshotdError
from snapshotd.metadata import DecisionId, JobFacts
from snapshotd.rpc.checks import malformed
from snapshotd.rpc.facts import job_from, job_to
from snapshotd.wire.points import point
from snapshotd.wire.protocol import MAX_CONTROL_BYTES
from snapshotd.wire.v1 import node_pb2 as pb

log = logging.getLogger(__name__)

_SUFFIX = ".job"

_POINT_SUFFIX = ".point"

_Mark = tuple[int, int, DecisionId | None, DecisionId | None, bool, bool]


class Records:
    """Job records in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: dict[str, _Mark] = {}
        self._points: dict[str, JobFacts] = {}

    def load(self) -> list[JobFacts]:
        """All records that can be read; one that cannot is an error the operator must see.

        Raises:
            SnapshotdError: a record is damaged: starting without it might start a job anew.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        return [self._recorded(path) for path in sorted(self._directory.glob(f"*{_SUFFIX}"))]

    def keep(self, jobs: Iterable[JobFacts]) -> None:
        """Write those records that have changed in what matters; remove those of no job."""
        jobs = list(jobs)
        for name in set(self._kept) - {job.job for job in jobs}:
            self._path(name).with_suffix(_POINT_SUFFIX).unlink(missing_ok=True)
            self._path(name).unlink(missing_ok=True)
            del self._kept[name], self._points[name]
        for job in jobs:
            mark = _mark(job)
            if self._kept.get(job.job) != mark:
                self._write(job, self._path(job.job), flush=True)
                self._kept[job.job] = mark
            restore_point = replace(job, decision=None, pending=None)
            if self._points.get(job.job) != restore_point:
                self._write(restore_point, self._path(job.job).with_suffix(_POINT_SUFFIX))
                self._points[job.job] = restore_point

    def _recorded(self, path: Path) -> JobFacts:
        facts, newest = self._read(path), path.with_suffix(_POINT_SUFFIX)
        return merge(facts, self._read(newest)) if newest.exists() else facts

    def _read(self, path: Path) -> JobFacts:
        try:
            facts = job_from(pb.JobFacts.FromString(_contents(path)))
            if self._path(facts.job) != path.with_suffix(_SUFFIX):
                raise malformed(f"it is of job {facts.job!r}")
            return facts
        except (DecodeError, RequestError, OSError) as error:
            raise SnapshotdError(
                f"the job record {path} is damaged: {error}",
                "Remove it if the job may start anew, or copy it from another node",
            ) from error

    def _path(self, job: str) -> Path:
        return self._directory / f"{quote(job, safe='')}{_SUFFIX}"

    def _write(self, job: JobFacts, path: Path, *, flush: bool = False) -> None:
        half = path.with_suffix(".half")
        point("supervisor.record.begun")
        try:
            half.unlink(missing_ok=True)
            with half.open("xb") as file:  # never through a link
                file.write(job_to(job).SerializeToString())
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            point("supervisor.record.half")
            half.replace(path)
            point("supervisor.record.done")
        except OSError as error:
            log.error("the record of job %r cannot be written: %s", job.job, error)


def _contents(path: Path) -> bytes:
    """The bytes of a plain file of a message's length at most. Raises OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CONTROL_BYTES:
            raise OSError(errno.EINVAL, "it is no plain file, or too long", str(path))
        return file.read(MAX_CONTROL_BYTES)


def _mark(job: JobFacts) -> _Mark:
    return (
        job.epoch,
        job.lineage,
        job.decision.id if job.decision else None,
        job.pending.id if job.pending else None,
        job.committed is not None,
        job.committed_in == job.lineage,
    )
