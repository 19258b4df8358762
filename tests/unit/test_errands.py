"""The program that speaks to the tier: asked by a daemon, ended by it, and ended with it."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotd.errors import DamagedBytes
from snapshotd.flow import errands
from snapshotd.metadata import Stored, Version
from snapshotd.tier.reading import TierError
from snapshotd.tier.store import Store
from snapshotd.wire.protocol import HEADER_BYTES, TRANSFER_BYTES
from tests.unit.test_children import no_more_files
from tests.unit.test_tier import BYTES, V1, image, sealed, write


def request(url: Path, what: str, **more: object) -> dict[str, object]:
    return {"what": what, "url": str(url), "job": "a/b", "version": (V1.epoch, V1.step), **more}


def segment(directory: Path, shard: int = 0) -> Path:
    path = directory / "data-0.seg"
    path.write_bytes(bytes(HEADER_BYTES) + image(shard) + bytes(4096))
    return path


def writing(tmp_path: Path, **more: object) -> dict[str, object]:
    (tmp_path / "tier").mkdir()
    record = base64.b64encode(sealed(0).SerializeToString()).decode()
    asked = {"path": str(segment(tmp_path)), "record": record, "bytes_per_s": 0.0, **more}
    return request(tmp_path / "tier", "write", **asked)


def test_a_shard_goes_out_and_the_step_is_published_and_pruned(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = writing(tmp_path)
    url = tmp_path / "tier"
    assert asyncio.run(errands.ask(out, lambda *p: told.append(p))) == {"written": True}
    assert told[-1] == (2 * BYTES, 2 * BYTES)
    assert asyncio.run(errands.ask(out)) == {"written": False}
    store = Store(str(url), "a/b")
    write(store, Version(6, 9), shards=(0,))  # of a dead attempt
    write(store, shards=(1,))
    keep = {"world": 2, "number": 0, "keep_last": 1, "keep_every_nth": 0}
    done = asyncio.run(errands.ask(request(url, "publish", **keep)))
    assert (done["removed"], done["not_removed"]) == (1, "")
    stored = errands.stored_from(done)
    assert [s.version for s in stored.steps] == [V1]
    assert stored.unfinished == ()
    assert asyncio.run(errands.look(str(url), "a/b")) == stored
    assert asyncio.run(errands.look(str(url), "other")) == Stored()


def test_an_image_comes_back_through_the_pipe_and_damage_ends_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path), "a/b")
    write(store)
    store.publish(V1, 2, 0)

    async def read() -> bytes:
        async with errands.running(request(tmp_path, "read", shard=1)) as errand:
            record = await errands.record_of(errand)
            found = b""
            while len(found) < record.image_bytes:
                found += await errand.bytes(min(TRANSFER_BYTES, record.image_bytes - len(found)))
            return found

    assert asyncio.run(read()) == image(1)
    (path,) = tmp_path.glob("*/data/*/shard-00001.image")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedBytes, match=r"shard-00001\.image: bytes"):
        asyncio.run(read())


def test_what_goes_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="nosuch"):
        asyncio.run(errands.look("nosuch://bucket", "job"))
    with pytest.raises(TierError, match="not there"):
        asyncio.run(errands.look(str(tmp_path / "mount"), "job"))
    with pytest.raises(TierError, match="ended with 1, saying ValueError"):
        asyncio.run(errands.ask(request(tmp_path, "sing")))
    wrong = writing(tmp_path)
    segment(tmp_path, shard=1)
    with pytest.raises(DamagedBytes, match="differ from what was sealed"):
        asyncio.run(errands.ask(wrong))


def test_one_that_cannot_be_started_now_is_an_error_that_may_heal(tmp_path: Path) -> None:
    async def look() -> None:
        with no_more_files():
            await errands.look(str(tmp_path), "job")

    with pytest.raises(TierError, match="cannot be started: Too many open files"):
        asyncio.run(look())


def test_a_program_that_stands_still_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errands, "STALL_S", 0.5)
    slow = writing(tmp_path, bytes_per_s=1000.0)
    with pytest.raises(TierError, match="gave no answer"):
        asyncio.run(errands.ask(slow))


def test_it_ends_with_the_daemon(tmp_path: Path) -> None:
    slow = writing(tmp_path, bytes_per_s=1000.0)
    with subprocess.Popen(
        [sys.executable, "-m", "snapshotd.tier.program"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as program:
        assert program.stdin is not None
        program.stdin.write(json.dumps(slow).encode() + b"\n")
        program.stdin.close()
        assert program.wait(60) == 3
    assert Store(str(tmp_path / "tier"), "a/b").look().steps == ()
