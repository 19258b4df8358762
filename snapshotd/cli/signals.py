"""Signals as something to wait for, or to clean up after; borrowed for a while and given back."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Final, Self

#: What ends a command that somebody started by hand or by a script.
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _borrowed(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Handle signals so for a while.

    One that the process was told to ignore, as nohup does with SIGHUP, stays ignored.
    """
    before = {
        number: signal.signal(number, handler)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


class BorrowedSignals:
    """Collects signals instead of acting on them; its descriptor is readable when there are any.

    Only for the main thread.
    """

    def __init__(self, numbers: Sequence[signal.Signals]) -> None:
        self._handlers = _borrowed(numbers, _only_wake)

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handlers.__exit__(kind, error, trace)
        signal.set_wakeup_fd(self._wakeup_before)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        return self._reader.fileno()

    def take(self) -> tuple[signal.Signals, ...]:
        """Signals that came since the last call, in order."""
        try:
            received = self._reader.recv(4096)
        except BlockingIOError:
            return ()
        return tuple(signal.Signals(number) for number in received)


def _only_wake(number: int, frame: FrameType | None) -> None:
    """The number is in the wake-up descriptor already."""


class Ending:
    """Turns a signal to end into SystemExit, in the part of the work that may be broken off.

    Elsewhere within the context, where things are made and cleared away, it only notes them. Only
    the first one counts. For the main thread.
    """

    def __init__(self) -> None:
        self._handlers = _borrowed(ENDING, self._note)
        self._came: int | None = None
        self._open = False

    def __enter__(self) -> Self:
        self._handlers.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handlers.__exit__(kind, error, trace)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """The part that a signal breaks off, one that came before it too. Raises SystemExit."""
        try:
            self._open = True
            self._break_off()
            yield
        finally:
            self._open = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._came is None:
            self._came = number
            self._break_off()

    def _break_off(self) -> None:
        if self._open and self._came is not None:
            self._open = False
            raise SystemExit(128 + self._came)
