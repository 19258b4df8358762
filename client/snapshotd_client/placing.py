"""Puts bytes of an image into live memory, in some threads, and compares each slice right behind.

A slice is compared while both sides of it are still in a core's cache, which costs a fraction of a
pass of its own. What was found the same is remembered, so that it need not be compared again.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, NamedTuple

import torch

from snapshotd_client.exact import copy_exact, memcmp, thread_count
from snapshotd_client.leaves import local_piece
from snapshotd_client.pages import touch

#: Both sides of it fit the second-level cache of one core.
_SLICE_BYTES: Final = 512 << 10


@dataclass(frozen=True, eq=False, slots=True)
class _Job:
    target: int  # address
    source: int  # address
    nbytes: int
    live: torch.Tensor  # kept, so that nobody else gets its memory
    fresh: bool  # never touched


class _Slice(NamedTuple):
    job: _Job
    start: int
    nbytes: int


class Placing:
    """Copies that are given one by one, and done together."""

    def __init__(self) -> None:
        self._given: list[_Job] = []
        self._same: list[_Job] = []

    def give(self, live: torch.Tensor, saved: torch.Tensor, *, fresh: bool = False) -> None:
        """Have the values of `saved` in `live`, which has its dtype and shape, after `run`.

        What is not plain memory in the same order is copied before this returns.
        """
        target, source = local_piece(live).detach(), local_piece(saved).detach()
        if not _plain_alike(target, source):
            self.forget()  # it may share memory with what was placed before
            copy_exact(live, saved)
        elif target.nbytes:
            at, like = target.data_ptr(), source.data_ptr()
            self._given.append(_Job(at, like, target.nbytes, target, fresh))

    def fill(self, fresh: torch.Tensor, saved: torch.Tensor) -> None:
        """As `give`, into memory that is new, and dense."""
        self.give(fresh, saved, fresh=True)

    def run(self, *, compare: bool) -> None:
        """Do all that was given.

        Args:
            compare: whether to compare behind each copy. Where other code runs afterwards that
                may write to the same memory, it would say nothing.
        """
        jobs, self._given = self._given, []
        differ = _in_threads(jobs, compare=compare)
        if compare:
            undisputed = _undisputed([*self._same, *jobs])
            self._same = [job for job in undisputed if job not in differ]
        with torch.no_grad():
            # As torch's own copy does, for whoever has kept one of them for a backward pass.
            torch.autograd.graph.increment_version([job.live for job in jobs])

    def forget(self) -> None:
        """Something else may have written: nothing is known to be the same."""
        self._same.clear()

    def known_same(self, live: torch.Tensor, saved: torch.Tensor) -> bool:
        """Whether these very bytes were compared, and were the same."""
        target, source = local_piece(live).detach(), local_piece(saved).detach()
        if not _plain_alike(target, source):
            return False
        at = target.data_ptr()
        number = bisect_right(self._same, at, key=attrgetter("target")) - 1
        if number < 0:
            return False
        job = self._same[number]
        ends = at + target.nbytes <= job.target + job.nbytes
        return ends and source.data_ptr() - job.source == at - job.target


def _plain_alike(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether both are memory of the processor's, without gaps, in the same order."""
    return (
        target.dtype == source.dtype
        and target.shape == source.shape
        and all(
            t.device.type == "cpu"
            and t.is_contiguous()
            and not (t.is_conj() or t.is_neg() or t.is_inference())
            for t in (target, source)
        )
    )


def _undisputed(jobs: Iterable[_Job]) -> Iterator[_Job]:
    """By address; without those that share memory with one that puts other bytes there."""
    together: list[_Job] = []
    end = 0
    for job in sorted(jobs, key=attrgetter("target")):
        if job.target >= end:
            yield from _agreeing(together)
            together = []
        together.append(job)
        end = max(end, job.target + job.nbytes)
    yield from _agreeing(together)


def _agreeing(jobs: list[_Job]) -> list[_Job]:
    return jobs if len({job.target - job.source for job in jobs}) == 1 else []


def _in_threads(jobs: list[_Job], *, compare: bool) -> set[_Job]:
    """Copy all; those jobs that differ afterwards, where that is asked."""
    slices = iter([*_cut(jobs)])
    count = min(thread_count(), len(jobs))
    if count < 2:
        return _work(slices, compare=compare)
    with ThreadPoolExecutor(count - 1) as pool:
        others = [pool.submit(_work, slices, compare=compare) for _ in range(count - 1)]
        mine = _work(slices, compare=compare)
        return mine.union(*(other.result() for other in others))


def _cut(jobs: Iterable[_Job]) -> Iterator[_Slice]:
    for job in jobs:
        for start in range(0, job.nbytes, _SLICE_BYTES):
            yield _Slice(job, start, min(_SLICE_BYTES, job.nbytes - start))


def _work(slices: Iterator[_Slice], *, compare: bool) -> set[_Job]:
    """Take slices until there are none; ctypes lets go of the interpreter lock in each call."""
    differ: set[_Job] = set()
    for job, start, nbytes in slices:
        target, source = job.target + start, job.source + start
        if job.fresh:
            touch(target, nbytes)
        ctypes.memmove(target, source, nbytes)
        if compare and memcmp(target, source, nbytes) != 0:
            differ.add(job)
    return differ
