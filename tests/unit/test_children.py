"""The SMP processes of a node: started, and started again."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapshotd.flow.children import Children

#: Says that it is there.
PROGRAM = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_that_cannot_be_started_now_is_started_later(tmp_path: Path) -> None:
    path = tmp_path / "here"

    async def check() -> None:
        here, asked = asyncio.Event(), []

        def arguments(slot: int) -> tuple[str, ...]:
            asked.append(slot)
            return ("-c", PROGRAM, str(path))

        def met(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()
            here.set()

        server = await asyncio.start_unix_server(met, path)
        children = Children(arguments)
        try:
            with no_more_files():
                children.ensure(3)
                await asyncio.sleep(0.01)
            assert asked == [3]
            async with asyncio.timeout(30):
                await here.wait()
        finally:
            await children.stop()
            server.close()

    asyncio.run(check())
