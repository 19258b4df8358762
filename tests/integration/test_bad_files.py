"""Damaged, foreign and missing files and directories: refused or quarantined, never believed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from snapshotd.wire.protocol import HEADER_BYTES
from snapshotd.wire.segment import decode_header
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1.segment_pb2 import SEGMENT_STATE_SEALED, SegmentHeader
from snapshotd_client import NoDaemon, Refused, SnapshotLost
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Job, Rank, segment_files


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    made = Cluster(group_size=2)
    yield made
    made.close()


def fresh(cluster: Cluster, **settings: object) -> Node:
    """A node of its own: no peers."""
    return cluster.node(f"x{len(cluster.nodes)}", seeds=[], **settings)


def refused_start(node: Node) -> str:
    """Start a daemon that must not run; what it said, in one sentence and not in a trace."""
    ended = subprocess.run(
        [sys.executable, "-m", "snapshotd", "serve", "--config", str(node.config)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode > 0, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr


# -- directories


def test_a_damaged_job_record(shared: Cluster) -> None:
    node = fresh(shared)
    record = node.run_dir / "job.job"
    for damage in (b"\xff\xff\xff", b"", pb.JobFacts(world=3).SerializeToString()):
        record.write_bytes(damage)
        said = refused_start(node)
        assert f"the job record {record} is damaged" in said
        assert "copy it from another node" in said
    record.unlink()
    node.start()
    node.stop()


@pytest.mark.parametrize("too_many", [1, 50])
def test_a_run_dir_too_long_for_sockets(shared: Cluster, too_many: int) -> None:
    length = 107 - len("/trainers.sock") + too_many
    run_dir = str(shared.root / "r").ljust(length, "r")
    said = refused_start(fresh(shared, run_dir=run_dir))
    assert f"makes socket paths of {107 + too_many} bytes, the system's limit is 107" in said
    assert f"Choose a run_dir that is {too_many} byte(s) shorter" in said


def test_what_another_daemon_has(shared: Cluster) -> None:
    owner = fresh(shared)
    owner.start()
    other = fresh(shared, listen=owner.address)
    assert f"cannot listen on {owner.address}" in (said := refused_start(other))
    assert "whose port is free" in said
    for key in ("run_dir", "shm_dir"):
        directory = getattr(owner, key)
        said = refused_start(fresh(shared, **{key: str(directory)}))
        assert f"{directory} is in use by another process (pid {owner.process.pid})" in said
        assert "a directory of its own" in said
    assert owner.ready()
    owner.stop()


def test_directories_that_cannot_be_used(shared: Cluster) -> None:
    file = shared.root / "file"
    file.write_text("")
    for key, where, why in (
        ("shm_dir", shared.root / "absent" / "deep", "No such file or directory"),
        ("shm_dir", file, "File exists"),
        ("shm_dir", Path("/proc/snapshotd"), "No such file or directory"),
        ("run_dir", file, "File exists"),
    ):
        said = refused_start(fresh(shared, **{key: str(where)}))
        assert f"{key} {where} cannot be used: {why}" in said
        assert f"Set {key} to a directory" in said


@pytest.fixture
def tiny() -> Iterator[Path]:
    """A tmpfs of 256 KiB."""
    where = Path(tempfile.mkdtemp(prefix="snapshotd-tiny-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        where.rmdir()
        pytest.skip("mounting a tmpfs is not permitted here")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)
    where.rmdir()


def alone(cluster: Cluster, **settings: object) -> Node:
    node = fresh(cluster, **settings)
    node.config.write_text(node.config.read_text().replace("parity = 1", "parity = 0"))
    node.start()
    return node


def remount(where: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(where)], check=True)


def _free_bytes(where: Path) -> int:
    stat = os.statvfs(where)
    return stat.f_bavail * stat.f_frsize


def train_grown(job: Job, steps: int) -> None:
    """Train with more to capture than memory was made ready for when the trainer attached."""
    for _ in range(steps):
        for rank in job.ranks:
            rank.train()
            assert rank.snap is not None
            rank.snap.step(job.next_step, more=torch.zeros(1 << 20))
        job.next_step += 1


def test_a_full_and_a_read_only_tmpfs(shared: Cluster, tiny: Path) -> None:
    node = alone(shared, shm_dir=str(tiny / "segments"))
    with pytest.raises(Refused) as caught:
        Job([(node, 0)], "full")
    assert caught.value.code == "no-room"
    assert "tmpfs of shm_dir has" in caught.value.what
    assert "mount -o remount,size=" in caught.value.remedy
    remount(tiny, "size=16m")
    job = Job([(node, 0)], "full", overlap="off")
    job.restore()
    job.train_protected(1)
    smps = node.smp_pids()
    ballast = tiny / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _free_bytes(tiny))
    train_grown(job, 2)
    said = job.ranks[0].snap.status()
    assert (said.skipped, "do not fit" in said.why_not) == (2, True), said
    assert "enlarge that tmpfs" in said.why_not
    ballast.unlink()
    job.train_until_protected()
    job.check()
    assert node.smp_pids() == smps, node.tail()
    job.close()
    node.stop()
    remount(tiny, "ro")
    assert "Read-only file system" in refused_start(node)


# -- memory


def test_a_budget_that_is_too_small_from_the_start(shared: Cluster) -> None:
    node = alone(shared, memory_budget="96KiB")
    with pytest.raises(Refused) as caught:
        Job([(node, 0)], "big")
    assert caught.value.code == "no-room"
    assert "2 generations of a shard of" in caught.value.what
    assert "memory_budget has 98304" in caught.value.what
    assert "raise memory_budget" in caught.value.remedy
    assert node.ready()
    node.stop()


def test_a_budget_that_is_used_up_later(shared: Cluster) -> None:
    node = alone(shared, memory_budget="16MiB")
    job = Job([(node, 0)], "later", overlap="off")
    job.restore()
    job.train_protected(1)
    ballast = node.shm_dir / "slot-9" / "data-0.seg"
    ballast.parent.mkdir()
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 16 << 20)
    train_grown(job, 3)
    said = job.ranks[0].snap.status()
    assert said.skipped == 3
    assert re.search(r"needs \d+ bytes, budget 16777216, in use \d{8}\b", said.why_not)
    assert "raise memory_budget" in said.why_not
    ballast.unlink()
    job.train_until_protected()
    job.check()
    job.close()
    node.stop()


# -- segments


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 1]))


def header(path: Path) -> SegmentHeader:
    return decode_header(path.read_bytes()[:HEADER_BYTES])


def all_sealed(node: Node, kind: str) -> list[Path]:
    """Segments of a node that hold a sealed shard, or a sealed parity block; the newest first."""
    found = [
        path
        for path in segment_files(node)
        if path.name.startswith(kind) and header(path).state == SEGMENT_STATE_SEALED
    ]
    return sorted(found, key=lambda path: -header(path).version.step)


def sealed(node: Node, kind: str) -> Path:
    return all_sealed(node, kind)[0]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def flip_image(path: Path) -> None:
    flip(path, HEADER_BYTES + header(path).image_bytes // 2)


def flip_record(path: Path) -> None:
    flip(path, HEADER_BYTES + header(path).image_capacity + 3)


def flip_header(path: Path) -> None:
    flip(path, 40)


def make_foreign(path: Path) -> None:
    path.write_bytes(b"\x7fELF" + bytes(path.stat().st_size - 4))


def make_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


DAMAGES = (cut, cut_to_nothing, flip_image, flip_record, flip_header, make_foreign, make_link)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Cluster, list[Node]]]:
    cluster = Cluster(group_size=2)
    try:
        yield cluster, cluster.start(2)
    finally:
        cluster.close()


def saved(nodes: list[Node], name: str) -> Job:
    job = Job([(node, 0) for node in nodes], name)
    job.restore()
    job.train_protected(2)
    job.vanish()
    return job


def again(nodes: list[Node], name: str, tier: str = "group") -> None:
    """The job comes back on all ranks together, trains, and every byte is right."""
    job = Job([(node, 0) for node in nodes], name)
    restored = job.restore()
    assert all(r.step == 1 for r in restored)
    job.check()
    job.train_protected(1)
    job.check()
    job.close()


def quarantined(node: Node) -> int:
    return node.status().slots[0].counters.quarantined


def dropped(nodes: list[Node], job: str) -> None:
    """Forget a job, so that the next finds empty slots."""
    from snapshotd.rpc.operator import drop

    eventually("no trainer is left", lambda: not _trained(nodes))
    drop(nodes[0].address, job, 5.0)
    eventually("nothing is held", lambda: not any(s.data for n in nodes for s in n.status().slots))


def _trained(nodes: list[Node]) -> bool:
    return any(s.HasField("trainer") for n in nodes for s in n.status().slots)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damage_found_at_adoption(
    pair: tuple[Cluster, list[Node]], damage: Callable[[Path], None]
) -> None:
    nodes, name = pair[1], f"adopt-{damage.__name__}"
    saved(nodes, name)
    nodes[0].kill()
    victims = [sealed(nodes[0], kind) for kind in ("data", "parity")]
    for victim in victims:
        damage(victim)
    nodes[0].start()
    eventually("they are quarantined", lambda: quarantined(nodes[0]) == 2)
    assert all(f"{victim} is removed: " in nodes[0].tail() for victim in victims)
    again(nodes, name)
    dropped(nodes, name)


@pytest.mark.parametrize("damaged", ["data", "parity and data"])
def test_damage_found_at_restore(pair: tuple[Cluster, list[Node]], damaged: str) -> None:
    nodes, name = pair[1], f"restore-{damaged.replace(' ', '-')}"
    saved(nodes, name)
    before = [quarantined(node) for node in nodes]
    if damaged == "data":
        flip_image(sealed(nodes[0], "data"))
        again(nodes, name)
        assert quarantined(nodes[0]) == before[0] + 1
        assert quarantined(nodes[1]) == before[1]
        dropped(nodes, name)
        return
    # The other node notices only when it is asked for the block, and must lose it then.
    victims = [all_sealed(nodes[0], "data"), all_sealed(nodes[1], "parity")]
    for victim in (path for paths in victims for path in paths):
        flip_image(victim)
    job = Job([(node, 0) for node in nodes], name)
    untouched = [rank.digest() for rank in job.ranks]
    found = list(job._pool.map(_outcome, job.ranks))
    assert all(isinstance(error, SnapshotLost) for error in found), found
    assert all("shard 0 is missing" in str(error) for error in found)
    assert [rank.digest() for rank in job.ranks] == untouched
    found = [b + len(v) for b, v in zip(before, victims, strict=True)]
    assert [quarantined(n) for n in nodes] == found
    job.close()
    dropped(nodes, name)


def _outcome(rank: Rank) -> BaseException | None:
    assert rank.snap is not None
    try:
        rank.snap.restore(timeout_s=40.0)
    except SnapshotLost as error:
        return error
    return None


def test_no_daemon_at_all(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        nowhere = Node("none", "", root, tmp_path, tmp_path, tmp_path)
        with pytest.raises(NoDaemon) as caught:
            Rank(0, 1).attach(nowhere)
        assert str(nowhere.run_dir) in caught.value.what
        assert "snapshotd serve --config" in caught.value.remedy
        (tmp_path / "run").mkdir(exist_ok=True)
