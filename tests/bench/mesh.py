"""Some processes that send bytes to each other over plain sockets, all at once: `python -m`.

What protection is measured against: the same bytes between as many processes, and nothing else.
Speaks with its maker in lines: prints its port, reads the others' ports and how many bytes each of
them is to get, then for every further line sends and receives them all, and answers with a line.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

CHUNK_BYTES = 1 << 20


def _send(peer: socket.socket, block: memoryview, left: int) -> None:
    while left:
        peer.sendall(block[:left])
        left -= min(left, len(block))


def _receive(peer: socket.socket, buffer: memoryview, left: int) -> None:
    while left:
        got = peer.recv_into(buffer[:left])
        assert got, "a process of the mesh has died"
        left -= got


def _serve() -> None:
    lines = iter(sys.stdin)
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        told = json.loads(next(lines))
        # Listening sockets take what is not accepted yet, so nobody waits for anybody here.
        outward = [socket.create_connection(("127.0.0.1", port)) for port in told["ports"]]
        inward = [server.accept()[0] for _ in outward]
    print(flush=True)
    block = memoryview(bytearray(CHUNK_BYTES))
    buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in inward]
    for _ in lines:
        threads = [
            threading.Thread(target=_send, args=(peer, block, told["bytes"])) for peer in outward
        ]
        threads += [
            threading.Thread(target=_receive, args=(peer, buffer, told["bytes"]))
            for peer, buffer in zip(inward, buffers, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(flush=True)


@contextmanager
def mesh(processes: int, bytes_each: int) -> Iterator[tuple[Callable[[], None], list[int]]]:
    """A call lets each of `processes` send `bytes_each` in all, in equal parts to all others.

    Yields:
        The call, and the processes' ids.
    """
    with ExitStack() as stack:
        members = []
        for _ in range(processes):
            member = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.mesh"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            stack.enter_context(member)  # closes its input, which ends it, and waits
            members.append(member)
        ports = [int(member.stdout.readline()) for member in members]
        for member, own in zip(members, ports, strict=True):
            others = [port for port in ports if port != own]
            told = {"ports": others, "bytes": bytes_each // len(others)}
            member.stdin.write(json.dumps(told) + "\n")
        _answers(members)

        def move() -> None:
            for member in members:
                member.stdin.write("\n")
            _answers(members)

        yield move, [member.pid for member in members]


def _answers(members: list[subprocess.Popen[str]]) -> None:
    for member in members:
        assert member.stdout.readline(), "a process of the mesh has died"


if __name__ == "__main__":
    _serve()
