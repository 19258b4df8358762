from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.errors import NoRoom
from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.memory.cgroup import cgroup_left_bytes, cgroup_limit_bytes
from snapshotd.memory.preflight import (
    Limits,
    Need,
    Room,
    beyond,
    check_room,
    measure_limits,
    measure_room,
    snapshot_need,
)
from snapshotd.memory.records import parity_record_bytes, seal_record_bytes
from snapshotd.memory.states import Kind

GIB = 1 << 30
ROOM = Room(
    budget_left_bytes=10 * GIB,
    tmpfs_free_bytes=10 * GIB,
    memory_available_bytes=10 * GIB,
    cgroup_left_bytes=10 * GIB,
    descriptors_left=1000,
)


def test_what_fits_exactly_fits() -> None:
    check_room(Need(10 * GIB, 1000), ROOM)
    check_room(Need(10 * GIB, 1000), replace(ROOM, cgroup_left_bytes=None))


@pytest.mark.parametrize(
    ("field", "name", "remedy"),
    [
        ("budget_left_bytes", "memory_budget has 77", "raise memory_budget"),
        ("tmpfs_free_bytes", "tmpfs of shm_dir has 77", "remount,size"),
        ("memory_available_bytes", "free memory has 77", "larger one"),
        ("cgroup_left_bytes", "control group has 77", "MemoryMax="),
        ("descriptors_left", "limit of open files has 77", "LimitNOFILE="),
    ],
)
def test_each_shortage_is_named_with_its_remedy(field: str, name: str, remedy: str) -> None:
    with pytest.raises(NoRoom) as caught:
        check_room(Need(5 * GIB, 100, "two generations"), replace(ROOM, **{field: 77}))
    assert name in caught.value.what
    assert f"need {5 * GIB} bytes and 100 descriptors (two generations)" in caught.value.what
    assert caught.value.what.count(str(10 * GIB)) >= 3
    assert remedy in caught.value.remedy


def test_all_shortages_are_named_at_once() -> None:
    with pytest.raises(NoRoom) as caught:
        check_room(Need(1, 1), Room(0, 0, 0, 0, 0))
    assert caught.value.remedy.count(";") == 4


@given(st.integers(64 << 20, 64 * GIB), st.integers(1, 4), st.integers(2, 32), st.data())
def test_the_need_is_the_formula_and_little_more(image_bytes, generations, n, data) -> None:
    m = data.draw(st.integers(0, n - 1))
    need = snapshot_need(image_bytes, generations, n, m)
    formula = generations * image_bytes * (1 + m / (n - m))
    assert formula <= need.bytes <= 1.35 * formula
    half = snapshot_need(image_bytes, generations, n, m, allocated_bytes=need.bytes // 2)
    assert half.bytes == need.bytes - need.bytes // 2
    assert snapshot_need(image_bytes, generations, n, m, allocated_bytes=2 * need.bytes).bytes == 0


@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 2), (2, -1)])
def test_impossible_groups_are_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        snapshot_need(1, 1, n, m)


@pytest.mark.parametrize("image_bytes", [0, 1, 100_000, 5_000_001])
def test_what_passed_the_preflight_can_be_claimed(shm_path: Path, image_bytes: int) -> None:
    n, m, generations = 4, 2, 3
    need = snapshot_need(image_bytes, generations, n, m)
    arena = Arena(shm_path / "slot-0", Budget(shm_path, need.bytes))
    arena.open()
    block = -(-image_bytes // (n - m))
    for _ in range(generations):
        arena.claim(Kind.DATA, image_bytes, seal_record_bytes("job", image_bytes))
        for _ in range(m):
            record = parity_record_bytes("job", [image_bytes] * n, block)
            arena.claim(Kind.PARITY, block, record)
    arena.close()


def test_room_is_measured(shm_path: Path) -> None:
    room = measure_room(shm_path, Budget(shm_path, 5 * GIB))
    assert room.budget_left_bytes == 5 * GIB
    assert room.tmpfs_free_bytes > 0
    assert room.memory_available_bytes > 0
    assert room.descriptors_left > 0
    with pytest.raises(NoRoom, match="removed"):
        measure_room(shm_path / "absent", Budget(shm_path, GIB))


def cgroup(tmp_path: Path, membership: str, files: dict[str, str]) -> int | None:
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return cgroup_left_bytes(tmp_path / "membership", tmp_path / "mount")


def test_the_tightest_limit_of_cgroup_v2_counts(tmp_path: Path) -> None:
    files = {
        "memory.max": "9000\n",
        "memory.current": "100\n",
        "a/memory.max": "5000\n",
        "a/memory.current": "4500\n",
        "a/memory.stat": "anon 4000\ninactive_file 300\n",
        "a/b/memory.max": "max\n",
        "a/b/memory.current": "4500\n",
    }
    assert cgroup(tmp_path, "0::/a/b\n", files) == 800
    assert cgroup_limit_bytes(tmp_path / "membership", tmp_path / "mount") == 5000


def test_cgroup_v1_within_a_container_is_found_at_the_mount(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "5000\n",
        "memory/memory.usage_in_bytes": "6000\n",
        "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 0\n",
    }
    assert cgroup(tmp_path, "5:cpu:/x\n4:memory:/docker/abc\n0::/x\n", files) == 0


def test_no_limit_is_none(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "6000\n",
    }
    assert cgroup(tmp_path, "4:memory:/\n", files) is None
    assert cgroup_left_bytes(tmp_path / "absent", tmp_path) is None
    assert cgroup_limit_bytes(tmp_path / "membership", tmp_path / "mount") is None


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(99, None, 200), ["the machine's memory of 99 bytes"]),
        (Limits(200, 99, 200), ["the control group of 99 bytes"]),
        (Limits(200, None, 99), ["the tmpfs of shm_dir of 99 bytes"]),
        (Limits(100, 100, 100), []),
    ],
)
def test_a_budget_above_what_there_is_is_named(limits: Limits, says: list[str]) -> None:
    found = beyond(100, limits)
    assert len(found) == len(says)
    for sentence, part in zip(found, says, strict=True):
        assert sentence.startswith("memory_budget of 100 bytes is above")
        assert part in sentence


def test_limits_are_measured(shm_path: Path) -> None:
    limits = measure_limits(shm_path)
    assert limits.memory > 0
    assert limits.tmpfs > 0
    with pytest.raises(NoRoom, match="removed"):
        measure_limits(shm_path / "absent")
