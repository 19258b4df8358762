"""Has the main thread run something between two of its bytecodes: while no operation is under way.

A tensor's version counter moves when an in-place operation has ended. So only the thread that
trains can say that nothing is being written to a tensor; and it says so here, soon, without
being made to wait. Python's documented `Py_AddPendingCall` does it; signal handlers run likewise.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

#: What is to be run. Module-wide, as is Python's own list: the function that it calls must outlive
#: everybody, and a SimpleQueue may be used from within anything.
_waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()


def _run_all(_: object) -> int:
    while True:
        try:
            call = _waiting.get_nowait()
        except Empty:
            return 0
        call()


_Pending = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_run_all_pending = _Pending(_run_all)
_add = ctypes.pythonapi.Py_AddPendingCall
_add.argtypes = (_Pending, ctypes.c_void_p)
_add.restype = ctypes.c_int


def soon(call: Callable[[], None], thread: int) -> None:
    """Have `thread` run `call`, if it is the main thread; else nothing happens.

    Args:
        call: quick, takes no lock; may run while that thread is within any Python function.
        thread: its identifier.
    """
    if thread == threading.main_thread().ident:
        _waiting.put(call)
        # Full only when the main thread has not run for long: then it asks by itself.
        _add(_run_all_pending, None)
