"""The program that speaks to the store for a daemon: `python -m snapshotd.tier.program`.

A process of its own, one for each errand: what the store's library takes of memory, processors
and time is not the daemon's, and it can be ended at any moment. It reads one request from standard
input, a line of JSON, and answers with lines of JSON on standard output: progress, then `done`. An
image that was asked for follows its `record` as it is; ranges of images come alone. What went wrong
is the last line on standard error. It ends when its standard input does, that is with the daemon.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import sys
import threading
import time
from typing import Any, BinaryIO, Final

from snapshotd.core.persist import Schedule, leftovers, removable
from snapshotd.errors import DamagedBytes, SnapshotdError
from snapshotd.metadata import Stored, Version
from snapshotd.tier.store import Store
from snapshotd.wire.points import point
from snapshotd.wire.protocol import HEADER_BYTES
from snapshotd.wire.v1.segment_pb2 import SealRecord

_ORPHANED: Final = 3
#: Seconds between two words of progress.
_TELL_EVERY: Final = 0.5


def stored_to(stored: Stored) -> dict[str, Any]:
    """As plain data, for a line of JSON."""
    steps = [[s.version.epoch, s.version.step, s.world, s.number, s.unix_s] for s in stored.steps]
    return {
        "steps": steps,
        "unfinished": [[v.epoch, v.step] for v in stored.unfinished],
        "damaged": [[v.epoch, v.step, why] for v, why in stored.damaged],
    }


class Errand:
    """One request, and where its answer goes."""

    def __init__(self, request: dict[str, Any], out: BinaryIO) -> None:
        self._request = request
        self._out = out
        self._store = Store(request["url"], request["job"])
        self._told_s = 0.0

    def run(self) -> None:
        """Raises SnapshotdError."""
        match self._request["what"]:
            case "look":
                stored = self._store.look()
                point("tier.look.done")
                self._say(done=stored_to(stored))
            case "write":
                self._write()
            case "publish":
                self._publish()
            case "read":
                self._read()
            case "records":
                for record in self._store.indexed_seals(self._version, self._request["shards"]):
                    self._tell(record)
            case "ranges":
                for piece in self._store.pieces(self._version, self._request["spans"]):
                    self._out.write(piece)
                    point("tier.ranges.piece")
                self._out.flush()
            case what:
                raise ValueError(f"there is no errand {what!r}")

    def _say(self, **answer: object) -> None:
        self._out.write(json.dumps(answer).encode() + b"\n")
        self._out.flush()

    def _tell(self, record: SealRecord) -> None:
        self._say(record=base64.b64encode(record.SerializeToString()).decode())

    def _progress(self, done: int, total: int) -> None:
        """Now and then, and in the end: each line wakes the daemon."""
        now_s = time.monotonic()
        if now_s - self._told_s >= _TELL_EVERY or done == total:
            self._told_s = now_s
            self._say(progress=[done, total])

    @property
    def _version(self) -> Version:
        return Version(*self._request["version"])

    def _write(self) -> None:
        record = SealRecord.FromString(base64.b64decode(self._request["record"]))
        descriptor = os.open(self._request["path"], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            length = HEADER_BYTES + record.image_bytes
            if os.fstat(descriptor).st_size < length:
                raise DamagedBytes(f"{self._request['path']} is shorter than what was sealed")
            with (
                mmap.mmap(descriptor, length, prot=mmap.PROT_READ) as mapping,
                memoryview(mapping) as whole,
                whole[HEADER_BYTES:] as image,
            ):
                written = self._store.write(
                    image,
                    record,
                    self._request["bytes_per_s"],
                    self._progress,
                )
        finally:
            os.close(descriptor)
        self._say(done={"written": written})

    def _publish(self) -> None:
        keep = Schedule(0.0, 0, self._request["keep_last"], self._request["keep_every_nth"])
        version = self._version
        self._store.publish(version, self._request["world"], self._request["number"])
        stored = self._store.look()
        # Only now, with a whole step that was just verified, may others go.
        removed = [*removable(stored.steps, keep), *leftovers(stored, version)]
        removed = [v for v in removed if v != version]
        self._say(progress=[0, len(removed)])
        failure = ""
        try:
            self._store.remove(removed)
            stored = self._store.look()
        except SnapshotdError as error:
            failure = str(error)
        self._say(done={**stored_to(stored), "removed": len(removed), "not_removed": failure})

    def _read(self) -> None:
        record = self._store.indexed_seal(self._version, self._request["shard"])
        self._tell(record)
        point("tier.read.known")
        for chunk in self._store.read(self._version, record):
            self._out.write(chunk)
            point("tier.read.chunk")
        self._out.flush()


def _end_with_the_daemon() -> None:
    """Until standard input ends; whatever is under way then is worth nothing to anybody."""
    # Not through the buffer: its lock must be free when the program ends by itself.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(_ORPHANED)


def main() -> int:
    """One errand."""
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_daemon, daemon=True).start()
    # What a library prints must not stand between our lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        with out:
            Errand(request, out).run()
    except SnapshotdError as error:
        damaged = isinstance(error, DamagedBytes)
        sys.stderr.write("\n" + json.dumps({"error": str(error), "damaged": damaged}) + "\n")
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
