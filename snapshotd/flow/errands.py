"""Sends the program that speaks to the persistent tier on its errands; see `tier.program`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from google.protobuf.message import DecodeError

from snapshotd.errors import DamagedBytes, RequestError
from snapshotd.metadata import Stored, StoredStep, Version
from snapshotd.rpc.checks import check_seal
from snapshotd.tier.reading import TierError
from snapshotd.wire.v1.segment_pb2 import SealRecord

#: Without a word or a byte for so long, the program is given up: its library waits for something.
STALL_S: Final = 120.0

#: Longest line: the digests of an image of some hundred GB. Also what of an image is held at once.
_LINE_BYTES: Final = 8 << 20
#: Of what the program says on standard error, the end.
_TAIL_BYTES: Final = 64 << 10

Request = dict[str, Any]


class Errand:
    """One running program."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self._process = process
        self._url = url
        assert process.stdout is not None
        assert process.stderr is not None
        self._out = process.stdout
        self._said = asyncio.create_task(_tail(process.stderr))

    async def answer(self) -> dict[str, Any]:
        """Its next line. Raises DamagedBytes, TierError: it ended without."""
        async with self.patience():
            try:
                line = await self._out.readline()
            except ValueError as error:
                raise TierError(
                    f"{self._url}: an answer of more than {_LINE_BYTES} bytes"
                ) from error
        if not line.endswith(b"\n"):
            raise await self._failure()
        found: dict[str, Any] = json.loads(line)
        return found

    async def bytes(self, count: int) -> bytes:
        """As many of its next bytes. Raises DamagedBytes, TierError: there are less."""
        try:
            async with self.patience():
                return await self._out.readexactly(count)
        except asyncio.IncompleteReadError as error:
            raise await self._failure() from error

    @asynccontextmanager
    async def patience(self) -> AsyncIterator[None]:
        """A wait for the program. Raises TierError: it stands still."""
        try:
            async with asyncio.timeout(STALL_S):
                yield
        except TimeoutError as error:
            raise TierError(
                f"{self._url} gave no answer for {STALL_S:.0f} s", "See whether it can be reached"
            ) from error

    async def _failure(self) -> DamagedBytes | TierError:
        async with self.patience():
            text = await self._said
            code = await self._process.wait()
        lines = text.decode(errors="replace").strip().splitlines()
        with suppress(ValueError, KeyError, IndexError, TypeError):
            said = json.loads(lines[-1])
            return (DamagedBytes if said["damaged"] else TierError)(said["error"])
        last = lines[-1][:400] if lines else "nothing"
        return TierError(f"the program that speaks to {self._url} ended with {code}, saying {last}")

    async def end(self) -> None:
        """Whatever it is doing."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        self._said.cancel()
        await asyncio.gather(self._said, return_exceptions=True)


async def _tail(stream: asyncio.StreamReader) -> bytes:
    kept = b""
    while more := await stream.read(_TAIL_BYTES):
        kept = (kept + more)[-_TAIL_BYTES:]
    return kept


@asynccontextmanager
async def running(request: Request) -> AsyncIterator[Errand]:
    """The program with its request; ended in the end, however far it came.

    Raises:
        TierError: it cannot be started, or takes nothing.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "snapshotd.tier.program",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
    except OSError as error:
        raise TierError(
            f"the program that speaks to {request['url']} cannot be started: {error.strerror}",
            "See that the node has descriptors, processes and memory left for it",
        ) from error
    errand = Errand(process, request["url"])
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        with suppress(ConnectionError):  # it has ended already; what it said tells why
            async with errand.patience():
                await process.stdin.drain()
        yield errand
    finally:
        await asyncio.shield(errand.end())


async def ask(
    request: Request, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> dict[str, Any]:
    """What the program has done. Raises DamagedBytes, TierError."""
    async with running(request) as errand:
        while True:
            answer = await errand.answer()
            if "done" in answer:
                done: dict[str, Any] = answer["done"]
                return done
            progress(*answer["progress"])


async def look(url: str, job: str) -> Stored:
    """What the tier holds of a job. Raises TierError."""
    return stored_from(await ask({"what": "look", "url": url, "job": job}))


def stored_from(done: dict[str, Any]) -> Stored:
    steps = tuple(StoredStep(Version(e, s), w, n, t) for e, s, w, n, t in done["steps"])
    damaged = tuple((Version(epoch, step), why) for epoch, step, why in done["damaged"])
    return Stored(steps, tuple(Version(*v) for v in done["unfinished"]), damaged)


async def record_of(errand: Errand) -> SealRecord:
    """The next record. Raises DamagedBytes, TierError."""
    answer = await errand.answer()
    try:
        record = SealRecord.FromString(base64.b64decode(answer["record"], validate=True))
        check_seal(record)
    except (binascii.Error, DecodeError, RequestError) as error:
        raise DamagedBytes(f"the record of a shard there: {error}") from error
    return record
