"""A store in memory of which each operation may fail, or be the last one of its program."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, ClassVar, Final

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

#: Of an image, what is there when its writing is torn.
HALF_BYTES: Final = 4_500


class Died(BaseException):
    """The errand is killed; nobody tidies up behind it."""


class Files(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in memory of which each operation may fail, or be the last one of its program."""

    protocol = ("simulated", "memory")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    chance: ClassVar[float] = 0.0
    seed: ClassVar[int] = 0
    uses: ClassVar[Counter[str]] = Counter()
    injected: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("simulated://", "memory://"))

    @classmethod
    def strike(cls, what: str, path: str) -> None:
        """By name and count of uses, so that it does not depend on which thread comes first."""
        key = f"{what} {path}"
        cls.uses[key] += 1
        drawn = random.Random(f"{cls.seed} {key} {cls.uses[key]}").random()
        if drawn < cls.chance / 2:
            cls.injected[f"killed at {what}"] += 1
            raise Died
        if drawn < cls.chance:
            cls.injected[f"failed at {what}"] += 1
            raise OSError(5, "the store fails")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> Any:
        self.strike("read", path)
        return super().cat_file(path, start, end, **more)

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        self.strike("list", path)
        return super().ls(path, detail, **more)

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        self.strike("before put", path)
        super().pipe_file(path, value, **more)
        self.strike("after put", path)

    def rm_file(self, path: str) -> None:
        self.strike("before delete", path)
        super().rm_file(path)
        self.strike("after delete", path)

    def rm(self, path: str, recursive: bool = False, maxdepth: Any = None) -> None:
        self.strike("before delete", path)
        super().rm(path, recursive, maxdepth)
        self.strike("after delete", path)

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        self.strike(f"open {mode}", path)
        file = super()._open(path, mode=mode, **more)
        if mode == "wb":
            half = HALF_BYTES
            write = file.write

            def torn(data: Any) -> int:
                write(bytes(data)[:half])
                self.strike("half written", path)
                return int(write(bytes(data)[half:]))

            file.write = torn
        return file


def flip(path: str) -> None:
    """One bit of a file at rest; twice is never."""
    buffer = Files.store[path].getbuffer()
    if len(buffer):
        buffer[len(buffer) // 2] ^= 1
    buffer.release()


fsspec.register_implementation("simulated", Files, clobber=True)
