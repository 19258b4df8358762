"""zfec's code, computed by ISA-L: ten to twenty-five times as fast.

Both count in GF(256) modulo x^8 + x^4 + x^3 + x^2 + 1, and ISA-L multiplies by any matrix. So the
matrices are zfec's own, read off by coding the unit vectors. This is the one module that calls C.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Final

import zfec

from snapshotd.coding.codec import Blocks, Codec

#: What ISA-L expands one coefficient to.
_TABLE_BYTES: Final = 32

#: Matrices that are kept: of each stripe that is coded, and of each pattern of loss.
_MATRICES: Final = 256

#: The system's library, by the name that its ABI has.
_SONAME: Final = "libisal.so.2"

_SIMPLE, _WRITABLE = 0, 1  # PyBUF_SIMPLE, PyBUF_WRITABLE


class IsalCodec(Codec):
    """ISA-L's `ec_encode_data` over zfec's matrices.

    Args:
        path: the shared library, as `dlopen` takes it.
        origin: where it is from, for people.

    Raises:
        OSError: there is no such library. AttributeError: it is no ISA-L.
    """

    def __init__(self, path: str, origin: str) -> None:
        library = ctypes.CDLL(path)  # its calls let other Python threads run
        self._init_tables = library.ec_init_tables
        self._init_tables.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * 2
        self._init_tables.restype = None
        self._encode_data = library.ec_encode_data
        self._encode_data.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 3
        self._encode_data.restype = None
        self._name = f"ISA-L {_version(library)}, {origin}"

    @property
    def name(self) -> str:
        return self._name

    def _code(self, k: int, m: int, blocks: Blocks, rows: Sequence[int], out: Blocks) -> None:
        self._multiply(_generator(k, m, tuple(rows)), blocks, out)

    def _solve(
        self,
        k: int,
        m: int,
        chosen: Sequence[int],
        blocks: Blocks,
        lost: Sequence[int],
        out: Blocks,
    ) -> None:
        self._multiply(_inverse(k, m, tuple(chosen), tuple(lost)), blocks, out)

    def _multiply(self, matrix: bytes, blocks: Blocks, out: Blocks) -> None:
        k, rows = len(blocks), len(out)
        tables = ctypes.create_string_buffer(_TABLE_BYTES * k * rows)
        self._init_tables(k, rows, matrix, tables)
        # Zeros at first: to release what was never got does nothing.
        buffers = (_Buffer * (k + rows))()
        try:
            sources = _addresses(blocks, buffers[:k], _SIMPLE)
            targets = _addresses(out, buffers[k:], _WRITABLE)
            self._encode_data(out[0].nbytes, k, rows, tables, sources, targets)
        finally:
            for buffer in buffers:
                _release_buffer(buffer)


def _addresses(
    blocks: Blocks, buffers: Sequence[_Buffer], flags: int
) -> ctypes.Array[ctypes.c_void_p]:
    """Where blocks lie in memory; they stay there until their buffers are released.

    Raises:
        BufferError: a block is not contiguous, or not writable where that is asked for.
    """
    for block, buffer in zip(blocks, buffers, strict=True):
        _get_buffer(block, buffer, flags)
    return (ctypes.c_void_p * len(buffers))(*(buffer.buf for buffer in buffers))


def libraries() -> Iterator[tuple[str, str]]:
    """Paths and origins of what may be ISA-L, the fastest first.

    The wheel of pyeclib holds a newer one than most systems do; pyeclib itself is not imported.
    """
    try:
        wheel = metadata.distribution("pyeclib")
    except metadata.PackageNotFoundError:
        pass
    else:
        for file in wheel.files or ():
            if file.name.startswith("libisal"):
                yield str(file.locate()), f"from pyeclib {wheel.version}"
    yield _SONAME, "from the system"


@lru_cache(_MATRICES)
def _generator(k: int, m: int, rows: tuple[int, ...]) -> bytes:
    """Coefficients of parity rows: for each row, one for each data block."""
    coded = zfec.Encoder(k, k + m).encode(_unit_vectors(k), [k + row for row in rows])
    return b"".join(coded)


@lru_cache(_MATRICES)
def _inverse(k: int, m: int, chosen: tuple[int, ...], lost: tuple[int, ...]) -> bytes:
    """Coefficients of lost data blocks: for each of them, one for each block chosen."""
    data = zfec.Decoder(k, k + m).decode(_unit_vectors(k), list(chosen))
    return b"".join(data[index] for index in lost)


def _unit_vectors(k: int) -> list[bytes]:
    return [bytes(i == j for j in range(k)) for i in range(k)]


def _version(library: ctypes.CDLL) -> str:
    """As it says itself, which it does from 2.31 on."""
    try:
        version = library.isal_get_version_str
    except AttributeError:
        return "before 2.31"
    version.restype = ctypes.c_char_p
    return str(version().decode())


class _Buffer(ctypes.Structure):
    """`Py_buffer` of the stable ABI of Python 3.11; the reference in `obj` is Python's own."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_Buffer)]
_release_buffer.restype = None
