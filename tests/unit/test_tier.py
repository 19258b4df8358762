"""A job's steps at a URL: written, verified, whole only with their index, deleted as a whole."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.errors import CallerError, DamagedBytes
from snapshotd.metadata import Stored, Version
from snapshotd.tier import layout
from snapshotd.tier.reading import TierError
from snapshotd.tier.store import Store
from snapshotd.tier.streams import Throttle
from snapshotd.wire.v1.segment_pb2 import SealRecord
from snapshotd.wire.v1.segment_pb2 import Version as VersionMessage

V1, V2 = Version(7, 1), Version(7, 2)
BYTES = (3 << 20) + 17


@pytest.fixture(params=["directory", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    place = tmp_path / "tier"
    place.mkdir()
    match request.param:
        case "directory":
            yield str(place)
        case "file":
            yield f"file://{place}"
        case _:
            yield f"memory://{uuid.uuid4()}"


def image(shard: int, version: Version = V1) -> memoryview:
    return memoryview(bytes([shard + version.step]) * BYTES)


def sealed(shard: int, version: Version = V1, world: int = 2, job: str = "a/b") -> SealRecord:
    digests = grain_digests(image(shard, version))
    return SealRecord(
        job=job,
        world=world,
        shard=shard,
        version=VersionMessage(epoch=version.epoch, step=version.step),
        image_bytes=BYTES,
        manifest_bytes=100,
        grain_digests=digests,
        content_digest=content_digest(digests),
    )


def write(store: Store, version: Version = V1, shards: tuple[int, ...] = (0, 1)) -> None:
    for shard in shards:
        store.write(image(shard, version), sealed(shard, version))


def test_a_step_is_there_when_its_index_is_and_comes_back(url: str) -> None:
    store = Store(url, "a/b")
    assert store.look() == Stored()
    write(store)
    assert store.look() == Stored((), (V1,))
    store.publish(V1, 2, 4)
    (step,) = store.look().steps
    assert (step.version, step.world, step.number) == (V1, 2, 4)
    again = Store(url, "a/b")
    for shard in (0, 1):
        record = again.indexed_seal(V1, shard)
        assert record == sealed(shard)
        assert b"".join(again.read(V1, record)) == image(shard)
        assert again.read_range(V1, record, 100) == image(shard)[:100]
    assert Store(url, "other").look() == Stored()


def test_what_was_verified_is_not_written_again(url: str) -> None:
    store = Store(url, "a/b")
    told: list[tuple[int, int]] = []
    assert store.write(image(0), sealed(0), 0.0, lambda *p: told.append(p))
    assert told == sorted(told)
    assert told[-1] == (2 * BYTES, 2 * BYTES)
    assert not store.write(image(0), sealed(0))


def test_what_another_history_left_under_the_same_name_is_written_over(url: str) -> None:
    store = Store(url, "a/b")
    write(store)
    other = sealed(1, V2)
    other.version.step = V1.step
    assert store.write(image(1, V2), other)
    assert store.seal(V1, 1) == other
    assert b"".join(store.read(V1, other)) == image(1, V2)


def test_no_index_without_every_shard(url: str) -> None:
    store = Store(url, "a/b")
    write(store, shards=(0,))
    with pytest.raises(DamagedBytes, match=r"shard-00001\.seal is missing"):
        store.publish(V1, 2, 0)
    store.write(image(1), sealed(1, world=3))
    with pytest.raises(DamagedBytes, match="of a job of 3 ranks, not 2"):
        store.publish(V1, 2, 0)
    assert store.look().steps == ()


def test_memory_that_is_damaged_is_not_written(url: str) -> None:
    store = Store(url, "a/b")
    with pytest.raises(DamagedBytes, match="differ from what was sealed"):
        store.write(image(1), sealed(0))
    with pytest.raises(DamagedBytes, match="missing"):
        store.seal(V1, 0)


def test_deleting_takes_all_of_a_step_and_nothing_else(url: str) -> None:
    store = Store(url, "a/b")
    for number, version in enumerate((V1, V2)):
        write(store, version)
        store.publish(version, 2, number)
    store.remove([V1])
    assert [s.version for s in store.look().steps] == [V2]
    assert store.look().unfinished == ()
    store.remove([V1])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    store = Store(str(tmp_path), "a/b")
    write(store)
    store.publish(V1, 2, 0)
    return tmp_path


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "seal", "other", "index", "format"])
def test_damage_is_named(place: Path, harm: str) -> None:
    store = Store(str(place), "a/b")
    (path,) = place.glob("*/data/*/shard-00001.image")
    (index,) = place.glob("*/steps/*.json")
    match harm:
        case "flip":
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        case "cut":
            os.truncate(path, BYTES - 1)
        case "remove":
            path.unlink()
        case "seal":
            path.with_suffix(".seal").write_bytes(b"nonsense")
        case "other":
            path.with_suffix(".seal").write_bytes(path.with_name("shard-00000.seal").read_bytes())
        case "index":
            index.write_text("[]")
        case "format":
            index.write_text(index.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DamagedBytes) as error:
        list(store.read(V1, store.indexed_seal(V1, 1)))
    assert "shard-00001" in str(error.value) or index.name in str(error.value)
    if harm in ("index", "format"):
        stored = store.look()
        assert stored.steps == (), "what cannot be read does not count"
        assert [(v, index.name in why) for v, why in stored.damaged] == [(V1, True)]


def test_a_directory_that_is_not_there_is_neither_empty_nor_made(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "mount"), "a/b")
    with pytest.raises(TierError, match="not there"):
        store.look()
    with pytest.raises(TierError, match="not there"):
        write(store)
    assert not (tmp_path / "mount").exists()


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path), "a/b")
    for number, remedy in ((errno.ENOSPC, "keep_last"), (errno.EACCES, "Allow the daemon's")):

        def fail(*_args: object, number: int = number, **_more: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(store._fs, "open", fail)
        with pytest.raises(TierError, match=remedy):
            write(store)


def test_a_full_disk_leaves_what_is_older_untouched(place: Path) -> None:
    store = Store(str(place), "a/b")
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}

    class Full:
        def write(self, _chunk: memoryview) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    real = store._fs.open
    store._fs.open = lambda path, mode="rb", **more: (
        Full() if mode == "wb" else real(path, mode, **more)
    )
    try:
        with pytest.raises(TierError, match="No space left"):
            write(store, V2)
    finally:
        store._fs.open = real
    assert {p: p.read_bytes() for p in before} == before
    assert [s.version for s in store.look().steps] == [V1]


def test_places_that_nobody_serves() -> None:
    with pytest.raises(CallerError, match="nosuch"):
        Store("nosuch://bucket/x", "job")


def test_fsspec_is_imported_only_where_a_tier_is() -> None:
    code = (
        "import sys, snapshotd.smp, snapshotd.daemon, snapshotd.tier.program;"
        "sys.exit('fsspec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_bandwidth_is_bound() -> None:
    throttle = Throttle(1000.0)
    throttle.passed(10)
    assert throttle._due_s > 0
    Throttle(0).passed(1 << 40)


def test_names(tmp_path: Path) -> None:
    path = layout.index_path(layout.job_path("/x/", "a/b c"), V1)
    assert path == "/x/a%2Fb%20c/steps/0000000000000007-0000000000000001.json"
    assert layout.version_of(path) == V1
    assert layout.version_of("/x/0000000000000007-0000000000000001/") == V1
    assert layout.version_of("/x/else.json") is None
    assert layout.version_of("/x/9999999999999999-0000000000000001.json") is None
    assert stat.S_ISDIR(tmp_path.stat().st_mode)


def test_pieces_of_images_come_in_the_order_asked_for_and_what_is_cut_is_damage(url: str) -> None:
    store = Store(url, "a/b")
    write(store)
    store.publish(V1, 2, 0)
    spans = [(1, BYTES - 5, 5), (0, 0, 7), *((1, at, 3) for at in range(0, 90, 3))]
    assert [len(p) for p in store.pieces(V1, spans)] == [5, 7, *[3] * 30]
    assert b"".join(store.pieces(V1, spans)) == bytes([2]) * 5 + bytes([1]) * 7 + bytes([2]) * 90
    with pytest.raises(DamagedBytes, match=r"shard-00001\.image has no 6 bytes"):
        list(store.pieces(V1, [(1, BYTES - 5, 6)]))
    with pytest.raises(DamagedBytes, match=r"shard-00001\.image has no 6 bytes"):
        list(store.pieces(V1, [(1, BYTES + 5, 6)]))
    with pytest.raises(DamagedBytes, match=r"shard-00007\.image is missing"):
        list(store.pieces(V1, [(0, 0, 1), (7, 0, 1)]))
    assert [r.shard for r in store.indexed_seals(V1, (1, 0))] == [1, 0]
    with pytest.raises(DamagedBytes, match="has no shard 2"):
        list(store.indexed_seals(V1, (0, 2)))
