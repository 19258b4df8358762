"""Fault points for daemons under test: SIGKILL itself before or after a named function.

Put on PYTHONPATH by a test, never imported by anything else. TEST_KILL is
"module:Class.method:before|after:smp|both"; it acts once, when the file TEST_KILL_ARM exists, and
removes that file to show that it acted.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import inspect
import os
import signal
import sys
from pathlib import Path


def _strike(role: str) -> None:
    try:
        Path(os.environ["TEST_KILL_ARM"]).unlink()
    except FileNotFoundError:
        return
    if role == "both":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _deadly(original, when: str, role: str):
    @functools.wraps(original)
    async def later(*arguments, **options):
        if when == "before":
            _strike(role)
        result = await original(*arguments, **options)
        if when == "after":
            _strike(role)
        return result

    @functools.wraps(original)
    def now(*arguments, **options):
        if when == "before":
            _strike(role)
        result = original(*arguments, **options)
        if when == "after":
            _strike(role)
        return result

    return later if inspect.iscoroutinefunction(original) else now


class _Finder(importlib.abc.MetaPathFinder):
    """Patches one module when it is imported."""

    def __init__(self, module: str, path: str, when: str, role: str) -> None:
        self._module, self._path, self._when, self._role = module, path, when, role

    def find_spec(self, name, path, target=None):
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            *owners, attribute = self._path.split(".")
            owner = functools.reduce(getattr, owners, module)
            deadly = _deadly(getattr(owner, attribute), self._when, self._role)
            setattr(owner, attribute, deadly)

        spec.loader.exec_module = exec_module
        return spec


if "TEST_KILL" in os.environ:
    sys.meta_path.insert(0, _Finder(*os.environ["TEST_KILL"].split(":")))
