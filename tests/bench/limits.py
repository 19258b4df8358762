"""What this machine can do at all: the limits that everything else is a ratio of."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import zfec

from snapshotd.coding.isal import libraries
from tests.bench.harness import MIB, Scale, Table, Timing, gb_per_s, timed

_SOCKET_CHUNK_BYTES = 4 * MIB


def run(scale: Scale) -> Iterator[Table]:
    table = Table("limits", "GB/s, one thread; busy: of its CPU time alone")
    for name, timing in measured(scale).items():
        table.add(
            limit=name,
            best=gb_per_s(scale.bytes, timing.best_s),
            median=gb_per_s(scale.bytes, timing.median_s),
            busy=gb_per_s(scale.bytes, timing.best_cpu_s),
        )
    yield table


def measured(scale: Scale) -> dict[str, Timing]:
    """Of `scale.bytes`: memcpy into touched tmpfs; from a loopback socket by `recv_into`."""
    source, target = np.ones(scale.bytes, np.uint8), tmpfs(scale.bytes)
    with loopback(scale.bytes) as receive:
        works = {"memcpy": lambda: np.copyto(target, source), "loopback": receive}
        return timed(works, scale.repeats)


def tmpfs(count_bytes: int) -> np.ndarray:
    """Touched memory of a tmpfs file, as a segment's is, in bytes; gone with the array."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, count_bytes)
        memory = np.frombuffer(mmap.mmap(file.fileno(), count_bytes), np.uint8)
    memory[:] = 0
    return memory


_SENDER = """
import socket, sys
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
block = memoryview(bytes(int(sys.argv[3])))
while peer.recv(1):
    left = int(sys.argv[2])
    while left:
        peer.sendall(block[:left])
        left -= min(left, len(block))
"""


@contextmanager
def loopback(count_bytes: int) -> Iterator[Callable[[], None]]:
    """A call receives `count_bytes` from another process over TCP, into the same memory again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        numbers = server.getsockname()[1], count_bytes, _SOCKET_CHUNK_BYTES
        sender = subprocess.Popen([sys.executable, "-c", _SENDER, *map(str, numbers)])
        connection, _ = server.accept()
    buffer = memoryview(bytearray(_SOCKET_CHUNK_BYTES))

    def receive() -> None:
        connection.sendall(b"g")
        left = count_bytes
        while left:
            got = connection.recv_into(buffer[:left])
            assert got, "the sender has died"
            left -= got

    try:
        yield receive
    finally:
        connection.close()
        sender.wait()


def raw_isal(
    k: int, m: int, chunk_bytes: int, data: np.ndarray, parity: np.ndarray
) -> Callable[[], None]:
    """A call runs bare `ec_encode_data` over blocks, chunk by chunk: no checks, no new memory.

    Args:
        data: k blocks, uint8[k, length]; `parity`: m, of the same length.
    """
    library = ctypes.CDLL(next(libraries())[0])
    matrix = b"".join(
        zfec.Encoder(k, k + m).encode(
            [bytes(i == j for j in range(k)) for i in range(k)], list(range(k, k + m))
        )
    )
    tables = ctypes.create_string_buffer(32 * k * m)
    library.ec_init_tables(k, m, matrix, tables)
    calls = [
        (
            min(chunk_bytes, data.shape[1] - at),
            k,
            m,
            tables,
            _pointers(data, at),
            _pointers(parity, at),
        )
        for at in range(0, data.shape[1], chunk_bytes)
    ]

    def encode() -> None:
        for call in calls:
            library.ec_encode_data(*call)

    return encode


def _pointers(blocks: Sequence[np.ndarray], at: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(blocks))(*(block.ctypes.data + at for block in blocks))
