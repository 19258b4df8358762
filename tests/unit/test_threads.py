"""Work on memory that is given back is never left behind in its thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from snapshotd.flow.threads import to_the_end


class Work:
    """Begins, waits until it may end, and says that it has."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun, self.may_end, self.ended = (threading.Event() for _ in range(3))
        self._error = error

    def __call__(self) -> str:
        self.begun.set()
        assert self.may_end.wait(30)
        self.ended.set()
        if self._error is not None:
            raise self._error
        return "done"


@pytest.mark.parametrize("error", [None, KeyError("late")])
@pytest.mark.parametrize("cancellations", [1, 3])
def test_who_is_cancelled_leaves_when_the_work_has_ended(
    error: Exception | None, cancellations: int
) -> None:
    async def check() -> None:
        work = Work(error)
        task = asyncio.create_task(to_the_end(work))
        assert await asyncio.to_thread(work.begun.wait, 30)
        for _ in range(cancellations):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
        assert not task.done()
        work.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.ended.is_set()

    asyncio.run(check())


def test_what_the_work_returns_and_raises_comes_out() -> None:
    async def check() -> None:
        assert await to_the_end(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await to_the_end(divmod, 7, 0)

    asyncio.run(check())
