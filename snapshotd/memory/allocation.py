"""Taking tmpfs memory so that it is really there: whole, touched, or refused with the numbers.

A file that is only lengthened has no pages; the first write to a page that cannot be had kills
the writer with SIGBUS. Here every page is allocated before anyone maps the file.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from snapshotd.errors import ConfigError, NoRoom, SnapshotdError
from snapshotd.wire.points import point

PAGE_BYTES: Final = mmap.PAGESIZE

#: What a file is called while it is made; removed by the next owner of the directory.
UNFINISHED_SUFFIX: Final = ".new"

#: mmap.MADV_POPULATE_WRITE, which Python does not name. Linux 5.14 and later.
_MADV_POPULATE_WRITE: Final = 23

#: Not mmap's own, which holds the interpreter lock: others of this process serve meanwhile.
_madvise: Final = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

#: Touched in pieces, because the kernel holds the lock of this process's memory for one's length.
_TOUCH_BYTES: Final = 8 << 20

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG})
_NO_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE})


def pages(count_bytes: int) -> int:
    """`count_bytes` rounded up to whole pages, bytes."""
    return -(-count_bytes // PAGE_BYTES) * PAGE_BYTES


def allocate(path: Path, first_page: bytes, size_bytes: int) -> None:
    """Make a file of `size_bytes`, all of its pages allocated, that starts with `first_page`.

    It appears under its name only when it is whole.

    Raises:
        NoRoom: the file system is full, or gone.
        ConfigError: the directory is read-only or forbidden.
        FileExistsError: `path` exists; or somebody makes it at this moment.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, "segment exists already", str(path))
    unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
    try:
        _fill(unfinished, first_page, size_bytes)
        point("smp.allocate.filled")
        unfinished.rename(path)
        point("smp.allocate.named")
    except FileExistsError:
        raise
    except OSError as error:
        raise explain(error, path, size_bytes) from error


def _fill(path: Path, first_page: bytes, size_bytes: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o660)
    with ExitStack() as undo:
        undo.callback(path.unlink)
        with os.fdopen(descriptor, "r+b", buffering=0):
            point("smp.allocate.created")
            os.posix_fallocate(descriptor, 0, size_bytes)
            os.pwrite(descriptor, first_page, 0)
        undo.pop_all()


def touch(mapping: mmap.mmap) -> None:
    """Map all pages of a new file into this process, so that no first use is slow.

    Contents do not change, but must not be in use: without MADV_POPULATE_WRITE zeros are written.
    """
    first = ctypes.c_char.from_buffer(mapping)
    address = ctypes.addressof(first)
    del first  # while it is there, the mapping cannot be closed
    for start in range(0, len(mapping), _TOUCH_BYTES):
        length = min(_TOUCH_BYTES, len(mapping) - start)
        if _madvise(address + start, length, _MADV_POPULATE_WRITE):
            number = ctypes.get_errno()
            if number != errno.EINVAL:
                raise OSError(number, os.strerror(number))
            _write_each_page(mapping, start, length)


def _write_each_page(mapping: mmap.mmap, start: int, length: int) -> None:
    # The first page is the header's and was written when the file was made.
    first = max(start, PAGE_BYTES)
    with memoryview(mapping) as whole, whole[first : start + length : PAGE_BYTES] as heads:
        heads[:] = bytes(len(heads))


def explain(error: OSError, path: Path, wanted_bytes: int = 0) -> SnapshotdError:
    """The error of ours that says what an OSError about segment memory means."""
    what = f"{path}: {error.strerror}"
    if error.errno in _FULL:
        return NoRoom(
            f"{path}: {wanted_bytes} bytes do not fit; its file system has "
            f"{_free_bytes(path)} bytes free ({error.strerror})",
            "enlarge that tmpfs (mount -o remount,size=...), point shm_dir at a larger one, or "
            "free a job's memory with `snapshotd drop JOB`",
        )
    if error.errno in _NO_FILES:
        return NoRoom(what, "raise the limit of open files (ulimit -n, LimitNOFILE=)")
    if error.errno == errno.ENOENT:
        return NoRoom(
            f"{what}: the directory was removed",
            "restart the daemon; run it as a system user, so that logind's RemoveIPC spares it",
        )
    return ConfigError(
        what, "set shm_dir to a directory on a tmpfs that this user may write, with 0770 rights"
    )


def _free_bytes(path: Path) -> int:
    try:
        stat = os.statvfs(path.parent)
    except FileNotFoundError:
        return 0
    return stat.f_bavail * stat.f_frsize
