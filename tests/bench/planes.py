"""Ways to stream blocks from one process to another: what each costs in processor time.

No digests, no code: chunks of TRANSFER_BYTES from memory, received and let go. gRPC and sockets are
the daemon's planes, in its frames; ZeroMQ and bare sockets are what they are measured against.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import zmq
import zmq.asyncio

from snapshotd.memory.heap import keep_freed
from snapshotd.rpc.channels import OPTIONS, Channels, Peer, listen
from snapshotd.rpc.connection import Connection, Kind
from snapshotd.rpc.framing import pack_reply, parse_reply
from snapshotd.rpc.tls import Identity, TlsFiles
from snapshotd.wire.protocol import TRANSFER_BYTES
from tests.bench.harness import Scale, Table, gb_per_s
from tests.integration.authority import Authority

PLANES = (
    "gRPC",
    "gRPC, TLS",
    "sockets",
    "sockets, TLS",
    "ZeroMQ",
    "ZeroMQ, CURVE",
    "bare sockets",
)
HOST = "127.0.0.1"
STALL_S = 10.0
#: Chunks that a ZeroMQ reader asks for ahead.
WINDOW = 4
_MEMORY_BYTES = 64 * TRANSFER_BYTES


def run(scale: Scale) -> Iterator[Table]:
    table = Table(
        f"Planes: streams of {TRANSFER_BYTES >> 10} KiB chunks between two processes",
        "best of the repeats; CPU s: seconds of processor time for each GB, of each end",
    )
    keep_freed()  # as SMPs do
    with tempfile.TemporaryDirectory() as directory:
        files = Authority(Path(directory) / "ca").of("n0")
        best: dict[str, tuple[float, float, float]] = {}
        for _ in range(scale.repeats):
            for plane in PLANES:
                taken = _stream(plane, scale.bytes // TRANSFER_BYTES, files)
                best[plane] = min(best.get(plane, taken), taken, key=lambda t: t[1] + t[2])
    for plane, (wall_s, sender_s, receiver_s) in best.items():
        gb = scale.bytes / 1e9
        table.add(
            plane=plane,
            gb_per_s=gb_per_s(scale.bytes, wall_s),
            sender_cpu_s=sender_s / gb,
            receiver_cpu_s=receiver_s / gb,
            both=(sender_s + receiver_s) / gb,
        )
    yield table


def _stream(plane: str, chunks: int, files: TlsFiles) -> tuple[float, float, float]:
    """Seconds on the wall, of the sender's processor time, and of the receiver's."""
    command = [sys.executable, "-m", "tests.bench.planes", plane, str(chunks)]
    paths = [str(path) for path in (files.ca, files.cert, files.key)]
    with subprocess.Popen([*command, *paths], stdout=subprocess.PIPE, text=True) as sender:
        told = json.loads(sender.stdout.readline())
        wall_s, receiver_s = asyncio.run(_receive(plane, chunks, told, files))
        sender_s = json.loads(sender.stdout.readline())
    return wall_s, sender_s, receiver_s


async def _receive(
    plane: str, chunks: int, told: dict[str, Any], files: TlsFiles
) -> tuple[float, float]:
    wall_s, cpu_s, got = time.perf_counter(), time.process_time(), 0
    async for chunk in _chunks(plane, chunks, told, files):
        got += len(chunk)
    assert got == chunks * TRANSFER_BYTES
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


async def _chunks(
    plane: str, chunks: int, told: dict[str, Any], files: TlsFiles
) -> AsyncIterator[memoryview]:
    if plane.startswith("gRPC"):
        identity = Identity.load(files, "test") if "TLS" in plane else None
        channels = Channels(identity)
        method: Any = channels.to(Peer("n0", f"{HOST}:{told['port']}")).unary_stream(
            "/planes/Read", response_deserializer=parse_reply
        )
        call = method(b"")
        while (part := await call.read()) is not grpc.aio.EOF:
            yield part
        await channels.close()
    elif plane.startswith("ZeroMQ"):
        context = zmq.asyncio.Context()
        peer = context.socket(zmq.DEALER)
        if "CURVE" in plane:
            peer.curve_publickey, peer.curve_secretkey = zmq.curve_keypair()
            peer.curve_serverkey = told["key"].encode()
        peer.connect(f"tcp://{HOST}:{told['port']}")
        for asked in range(chunks + WINDOW):
            if asked < chunks:
                await peer.send(b"")
            if asked >= WINDOW:
                yield (await peer.recv(copy=False)).buffer
        context.destroy(0)
    else:
        buffer = memoryview(bytearray(TRANSFER_BYTES))
        dialled = socket.create_connection((HOST, told["port"]))
        for chunk in _received(plane, dialled, buffer, chunks, files):
            yield chunk


def _received(
    plane: str, dialled: socket.socket, buffer: memoryview, chunks: int, files: TlsFiles
) -> Iterator[memoryview]:
    """The loop would have nothing else to do: in this thread."""
    if plane == "bare sockets":
        with dialled:
            for _ in range(chunks):
                at = 0
                while at < len(buffer):
                    at += dialled.recv_into(buffer[at:])
                yield buffer
        return
    with closing(Connection(dialled, STALL_S)) as connection:
        if "TLS" in plane:
            connection.secure(Identity.load(files, "test").dialling, server_side=False)
        for _ in range(chunks):
            kind, count = connection.head()
            assert (kind, count) == (Kind.CHUNK, len(buffer))
            connection.fill(buffer)
            yield buffer


def _say(what: Any) -> None:
    print(json.dumps(what), flush=True)


async def _send(plane: str, chunks: int, files: TlsFiles) -> None:
    """Serve one stream, and say what it took."""
    with mmap.mmap(-1, _MEMORY_BYTES) as memory:
        memory[:] = bytes(_MEMORY_BYTES)
        serve = {"gRPC": _send_grpc, "ZeroMQ": _send_zmq}
        kind = plane.partition(",")[0]
        view = memoryview(memory)
        try:
            await serve.get(kind, _send_sockets)(
                plane, [_chunk(view, i) for i in range(chunks)], files
            )
        finally:
            view.release()


def _chunk(view: memoryview, index: int) -> memoryview:
    at = index * TRANSFER_BYTES % _MEMORY_BYTES
    return view[at : at + TRANSFER_BYTES]


async def _send_grpc(plane: str, chunks: list[memoryview], files: TlsFiles) -> None:
    done = asyncio.Event()

    async def read(_: bytes, context: Any) -> None:
        cpu_s = time.process_time()
        for chunk in chunks:
            with chunk:
                await context.write(chunk)
        _say(time.process_time() - cpu_s)
        done.set()

    handler = grpc.unary_stream_rpc_method_handler(read, None, pack_reply)
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("planes", {"Read": handler}),)
    )
    identity = Identity.load(files, "test") if "TLS" in plane else None
    _say({"port": listen(server, f"{HOST}:0", identity)})
    await server.start()
    await done.wait()
    await server.stop(5)


async def _send_zmq(plane: str, chunks: list[memoryview], files: TlsFiles) -> None:
    context = zmq.asyncio.Context()
    peers, key = context.socket(zmq.ROUTER), b""
    if "CURVE" in plane:
        key, peers.curve_secretkey = zmq.curve_keypair()
        peers.curve_publickey, peers.curve_server = key, True
    _say({"port": peers.bind_to_random_port(f"tcp://{HOST}"), "key": key.decode()})
    cpu_s = None
    for chunk in chunks:
        name, _ = await peers.recv_multipart()
        cpu_s = cpu_s if cpu_s is not None else time.process_time()
        await peers.send_multipart([name, chunk], copy=False)
    _say(time.process_time() - cpu_s)
    await asyncio.to_thread(context.destroy, 5000)  # what is queued is still sent
    for chunk in chunks:
        chunk.release()


async def _send_sockets(plane: str, chunks: list[memoryview], files: TlsFiles) -> None:
    with socket.create_server((HOST, 0)) as server:
        _say({"port": server.getsockname()[1]})
        accepted, _ = await asyncio.to_thread(server.accept)
    if plane == "bare sockets":
        cpu_s = time.process_time()
        with accepted:
            for chunk in chunks:
                with chunk:
                    accepted.sendall(chunk)
    else:
        with closing(Connection(accepted, STALL_S)) as connection:
            if "TLS" in plane:
                connection.secure(Identity.load(files, "test").dialled, server_side=True)
            cpu_s = time.process_time()
            for chunk in chunks:
                with chunk:
                    connection.send(Kind.CHUNK, chunk)
    _say(time.process_time() - cpu_s)


if __name__ == "__main__":
    keep_freed()
    asyncio.run(_send(sys.argv[1], int(sys.argv[2]), TlsFiles(*map(Path, sys.argv[3:]))))
