from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotd.errors import Busy, CallerError, ConfigError, NoRoom
from snapshotd.memory import budget
from snapshotd.memory.arena import Arena, capacity_bytes
from snapshotd.memory.budget import Budget
from snapshotd.memory.locks import DirectoryLock, trainer_holding
from snapshotd.memory.segment import Segment
from snapshotd.memory.states import Kind, State
from snapshotd.metadata import Version

MIB = 1 << 20
VERSION = Version(epoch=1, step=5)


def arena_in(shm_dir: Path, limit_bytes: int = 64 * MIB, slot: int = 0) -> Arena:
    return Arena(shm_dir / f"slot-{slot}", Budget(shm_dir, limit_bytes))


@contextmanager
def opened(shm_dir: Path, limit_bytes: int = 64 * MIB, slot: int = 0) -> Iterator[Arena]:
    arena = arena_in(shm_dir, limit_bytes, slot)
    arena.open()
    try:
        yield arena
    finally:
        arena.close()


def filled(arena: Arena, image_bytes: int = 5000, step: int = 5) -> Segment:
    segment = arena.claim(Kind.DATA, image_bytes, 100)
    segment.begin_data("cluster", "job", 0, Version(1, step))
    return segment


def sealed(arena: Arena, image_bytes: int = 5000, step: int = 5) -> Segment:
    segment = filled(arena, image_bytes, step)
    segment.seal_data(1, image_bytes, 0)
    return segment


@contextmanager
def child(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has said "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def names(arena: Arena) -> list[str]:
    return sorted(segment.name for segment in arena.segments)


# -- claiming


def test_segments_have_the_lowest_free_name(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        first, second = filled(arena), filled(arena)
        parity = arena.claim(Kind.PARITY, 10, 10)
        assert [s.name for s in (first, second, parity)] == [
            "data-0.seg", "data-1.seg", "parity-0.seg",
        ]  # fmt: skip
        first.free()
        arena.trim(0)
        assert filled(arena).name == "data-0.seg"
        assert arena.allocated_bytes == sum(
            path.stat().st_size for path in arena.directory.glob("*.seg")
        )


def test_the_smallest_free_segment_that_fits_is_given(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        large, small, tiny = filled(arena, MIB), filled(arena, 100_000), filled(arena, 10)
        for segment in (large, small, tiny):
            segment.free()
        assert arena.claim(Kind.DATA, 100_000, 100) is small
        assert len(arena.segments) == 3


def test_a_record_that_does_not_fit_needs_another_segment(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        filled(arena).free()
        assert arena.claim(Kind.DATA, 10, 100_000).record_capacity >= 100_000


def test_a_segment_is_given_once_until_it_is_begun_or_given_back(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        first = arena.claim(Kind.DATA, 10, 10)
        second = arena.claim(Kind.DATA, 10, 10)
        assert first is not second
        assert arena.trim(0) == 0
        second.unclaim()
        assert arena.claim(Kind.DATA, 10, 10) is second
        with pytest.raises(ValueError, match="5000 characters"):
            first.begin_data("c", "j" * 5000, 0, VERSION)
        assert arena.claim(Kind.DATA, 10, 10) is first


def test_claims_of_many_threads_never_meet(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        filled(arena).free()
        given: list[Segment] = []
        threads = [
            threading.Thread(target=lambda: given.append(arena.claim(Kind.DATA, 10, 10)))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({segment.name for segment in given}) == 16


def test_pinned_segments_are_neither_given_nor_removed(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        segment = sealed(arena)
        segment.pin()
        with pytest.raises(ValueError, match="pinned"):
            segment.free()
        with pytest.raises(ValueError, match="pinned"):
            arena.quarantine(segment, "test")
        segment.unpin()
        segment.free()
        segment.pin()
        assert arena.claim(Kind.DATA, 10, 10) is not segment
        assert arena.trim(0) == 0
        segment.unpin()


def test_trim_keeps_the_largest_of_each_kind(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        segments = [filled(arena, size) for size in (10, 3 * MIB, MIB)]
        arena.claim(Kind.PARITY, 10, 10).unclaim()
        for segment in segments:
            segment.free()
        freed = arena.trim(1)
        assert freed == segments[0].size_bytes + segments[2].size_bytes
        assert names(arena) == ["data-1.seg", "parity-0.seg"]
        assert sorted(p.name for p in arena.directory.glob("*.seg")) == names(arena)


def test_no_descriptor_or_mapping_is_left_after_many_claims(shm_path: Path) -> None:
    def held() -> tuple[int, int]:
        mappings = Path("/proc/self/maps").read_text().count(str(shm_path))
        return len(list(Path("/proc/self/fd").iterdir())), mappings

    with opened(shm_path) as arena:
        before = held()
        for step in range(200):
            sealed(arena, 5000 + step % 3 * 50_000, step).free()
            if step % 2:
                arena.trim(0)
        arena.trim(0)
        assert held() == before
    assert held()[1] == 0


# -- the budget


def test_a_budget_refuses_with_the_numbers_and_the_remedy(shm_path: Path) -> None:
    with opened(shm_path, 2 * MIB) as arena:
        used = filled(arena, MIB).size_bytes
        with pytest.raises(NoRoom, match=rf"budget {2 * MIB}, in use {used}") as caught:
            arena.claim(Kind.DATA, MIB, 100)
        assert "memory_budget" in caught.value.remedy
        assert "snapshotd drop JOB" in caught.value.remedy
        assert not list(arena.directory.glob("*.new"))


def test_free_segments_give_way_before_a_claim_is_refused(shm_path: Path) -> None:
    with opened(shm_path, 3 * MIB) as arena:
        kept = sealed(arena, 100)
        for segment in [filled(arena, MIB) for _ in range(2)]:
            segment.free()
        arena.claim(Kind.PARITY, 100, 100).unclaim()
        assert arena.claim(Kind.DATA, 2 * MIB, 100).image_capacity >= 2 * MIB
        assert kept in arena.segments
        assert arena.allocated_bytes == Budget(shm_path, 0).used_bytes() <= 3 * MIB


_CLAIM_UNTIL_REFUSED = """
    import sys
    from pathlib import Path
    from snapshotd.errors import NoRoom
    from snapshotd.memory.arena import Arena
    from snapshotd.memory.budget import Budget
    from snapshotd.memory.states import Kind

    shm_dir, limit, slot = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    arena = Arena(shm_dir / f"slot-{slot}", Budget(shm_dir, limit))
    arena.open()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        while True:
            arena.claim(Kind.DATA, 100_000, 100)
    except NoRoom:
        print(len(arena.segments), flush=True)
    sys.stdin.readline()
"""


def test_two_processes_share_one_budget(shm_path: Path) -> None:
    limit = 4 * MIB
    counts = []
    with (
        child(_CLAIM_UNTIL_REFUSED, shm_path, limit, 0) as first,
        child(_CLAIM_UNTIL_REFUSED, shm_path, limit, 1) as second,
    ):
        for process in (first, second):
            process.stdin.write("go\n")
            process.stdin.flush()
        counts = [int(process.stdout.readline()) for process in (first, second)]
        used = Budget(shm_path, limit).used_bytes()
    size = 4096 + capacity_bytes(100_000) + 4096
    assert used == sum(counts) * size
    assert limit - size < used <= limit


_RESERVE_UNTIL_TOLD = """
    import sys
    from pathlib import Path
    from snapshotd.memory.budget import Budget
    with Budget(Path(sys.argv[1]), 100).reserve(10):
        print("ready", flush=True)
        sys.stdin.readline()
    print("through", flush=True)
    sys.stdin.readline()
"""


def test_a_killed_process_gives_the_budgets_lock_back(shm_path: Path) -> None:
    with child(_RESERVE_UNTIL_TOLD, shm_path) as process:
        process.kill()
        process.wait()
    with Budget(shm_path, 100).reserve(100):
        pass


def test_a_process_stopped_in_its_allocation_is_not_waited_for_for_ever(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LOCK_S", 0.2)
    with opened(shm_path, 3 * MIB) as arena, child(_RESERVE_UNTIL_TOLD, shm_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(Busy, match=rf"the process {process.pid} has held the lock"):
            arena.claim(Kind.DATA, 100, 100)
        # It is known now: nobody waits for it once more.
        monkeypatch.setattr(budget, "LOCK_S", 3600)
        with pytest.raises(Busy, match=rf"the process {process.pid} has held the lock"):
            arena.claim(Kind.DATA, 100, 100)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "through\n"
        arena.claim(Kind.DATA, 100, 100).unclaim()


def test_each_process_that_allocates_is_given_its_time(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LOCK_S", 0.4)
    taken = threading.Event()

    def hold_again_and_again() -> None:
        for _ in range(8):
            with holder.reserve(10):
                taken.set()
                threading.Event().wait(0.1)

    holder, busy = Budget(shm_path, 100), threading.Thread(target=hold_again_and_again)
    busy.start()
    taken.wait()
    with Budget(shm_path, 100).reserve(10):
        pass
    busy.join()


# -- adoption


def test_a_closed_arena_is_adopted_as_it_was(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        record = sealed(arena).record
        filled(arena)
        filled(arena).free()
    with opened(shm_path) as arena:
        assert [segment.state for segment in arena.segments] == [
            State.SEALED, State.FREE, State.FREE,
        ]  # fmt: skip
        (candidate,) = arena.candidates()
        candidate.verify()
        assert candidate.record == record


def test_what_cannot_be_a_segment_is_removed_and_named(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        paths = [sealed(arena, step=step).path for step in range(3)]
    os.truncate(paths[0], 9000)
    with paths[1].open("r+b") as file:
        file.seek(26)
        file.write(b"\xff")
    directory = arena.directory
    (directory / "empty.seg").touch()
    (directory / "foreign.seg").write_bytes(b"hello " * 2000)
    (directory / "data-9.seg.new").write_bytes(b"half made")
    (directory / "data-3.seg").mkdir()
    with opened(shm_path) as arena:
        pass
    arena = arena_in(shm_path)
    for path in (directory / "empty.seg", directory / "foreign.seg"):
        path.write_bytes(b"again")
    quarantined = dict(arena.open())
    assert sorted(quarantined) == ["data-3.seg", "empty.seg", "foreign.seg"]
    assert names(arena) == ["data-2.seg"]
    arena.candidates()[0].verify()
    assert [filled(arena).name for _ in range(3)] == ["data-0.seg", "data-1.seg", "data-4.seg"]
    assert not list(directory.glob("*.new"))
    arena.close()


def test_reasons_of_quarantine_are_precise(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        path = sealed(arena).path
    os.truncate(path, 9000)
    arena = arena_in(shm_path)
    ((name, reason),) = arena.open()
    assert name == "data-0.seg"
    assert "file is 9000 bytes, its header says" in reason
    arena.close()


def test_a_candidate_that_does_not_verify_is_quarantined(shm_path: Path) -> None:
    with opened(shm_path) as arena:
        segment = sealed(arena)
        view = segment.image(10)
        with pytest.raises(BufferError):
            arena.quarantine(segment, "in use")
        assert segment in arena.segments
        view.release()
        assert arena.quarantine(segment, "flipped").reason == "flipped"
        assert arena.segments == ()
        assert not segment.path.exists()
        with pytest.raises(ValueError, match="is not of"):
            arena.quarantine(segment, "twice")


_FILL_AND_SEAL = """
    import sys
    from pathlib import Path
    from snapshotd.memory.arena import Arena
    from snapshotd.memory.budget import Budget
    from snapshotd.memory.states import Kind
    from snapshotd.metadata import Version

    shm_dir = Path(sys.argv[1])
    arena = Arena(shm_dir / "slot-0", Budget(shm_dir, 1 << 30))
    arena.open()
    held, step = [], 0
    payload = bytes(range(256)) * 8192
    while True:
        segment = arena.claim(Kind.DATA, len(payload), 5000)
        segment.begin_data("c", "j", 0, Version(1, step))
        with segment.image(len(payload)) as image:
            image[:] = payload
        if sys.argv[2] == "filling":
            print("ready", flush=True)
            sys.stdin.readline()
        segment.seal_data(1, len(payload), 100)
        held.append(segment)
        if len(held) > 2:
            held.pop(0).free()
        step += 1
        if step == 4:
            print("ready", flush=True)
"""


def test_a_segment_whose_writer_was_killed_while_filling_is_free_again(shm_path: Path) -> None:
    with child(_FILL_AND_SEAL, shm_path, "filling") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with opened(shm_path) as arena:
        assert [segment.state for segment in arena.segments] == [State.FREE]
        assert arena.candidates() == ()


@pytest.mark.parametrize("turn", range(4))
def test_whenever_a_sealing_process_is_killed_what_is_sealed_is_whole(
    shm_path: Path, turn: int
) -> None:
    with child(_FILL_AND_SEAL, shm_path, "sealing") as process:
        threading.Event().wait(0.003 * turn)
        process.kill()
        process.wait()
    with opened(shm_path) as arena:
        # Two generations at least were kept at any moment.
        assert len(arena.candidates()) >= 2
        for segment in arena.candidates():
            segment.verify()
        steps = [segment.version.step for segment in arena.candidates()]
        assert max(steps) >= 3


# -- owners and places


def test_two_arenas_cannot_own_one_directory(shm_path: Path) -> None:
    with opened(shm_path):
        other = arena_in(shm_path)
        with pytest.raises(CallerError, match=rf"slot-0 is in use .*pid {os.getpid()}"):
            other.open()
        with opened(shm_path, slot=1):
            pass
    other.open()
    other.close()


def test_an_arena_that_fails_to_open_owns_nothing(shm_path: Path, monkeypatch) -> None:
    with opened(shm_path) as arena:
        sealed(arena)

    def refuse(path: Path) -> Segment:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(Segment, "open", refuse)
        with pytest.raises(NoRoom, match="Too many open files"):
            arena_in(shm_path).open()
    with opened(shm_path) as arena:
        assert len(arena.candidates()) == 1


def test_a_constructor_touches_nothing(shm_path: Path) -> None:
    arena_in(shm_path / "never")
    assert not list(shm_path.iterdir())


def test_an_absent_directory_is_made_and_a_mistyped_one_is_not(shm_path: Path) -> None:
    with opened(shm_path / "snapshotd"):
        assert (shm_path / "snapshotd" / "slot-0").stat().st_mode & 0o007 == 0
    with pytest.raises(ConfigError, match="does not exist") as caught:
        arena_in(shm_path / "mistyped" / "snapshotd").open()
    assert "shm_dir" in caught.value.remedy


def test_a_file_in_the_place_of_the_directory_is_refused(shm_path: Path) -> None:
    (shm_path / "slot-0").touch()
    with pytest.raises(ConfigError, match="slot-0"):
        arena_in(shm_path).open()


def test_a_directory_that_vanished_is_explained(shm_path: Path) -> None:
    with opened(shm_path / "a") as arena:
        arena.directory.rename(shm_path / "gone")
        with pytest.raises(NoRoom, match="was removed"):
            arena.claim(Kind.DATA, 10, 10)
        with pytest.raises(NoRoom, match="was removed"):
            arena_in(shm_path / "absent").claim(Kind.DATA, 10, 10)


@contextmanager
def small_tmpfs(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount program")
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_tmpfs_is_refused_with_the_numbers_and_stays_usable(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "shm", "size=1m") as shm_dir, opened(shm_dir) as arena:
        kept = sealed(arena, 200_000)
        with pytest.raises(NoRoom, match=r"bytes do not fit; .* bytes free") as caught:
            arena.claim(Kind.DATA, 2 * MIB, 100)
        assert "remount,size" in caught.value.remedy
        assert not list(arena.directory.glob("*.new"))
        kept.verify()
        sealed(arena, 200_000).verify()


def test_a_full_tmpfs_makes_free_segments_give_way(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "shm", "size=1m") as shm_dir, opened(shm_dir) as arena:
        filled(arena, 500_000).free()
        sealed(arena, 800_000).verify()
        assert len(arena.segments) == 1


def test_a_read_only_tmpfs_is_refused(tmp_path: Path) -> None:
    with (
        small_tmpfs(tmp_path / "shm", "size=1m,ro") as shm_dir,
        pytest.raises(ConfigError, match="Read-only") as caught,
    ):
        arena_in(shm_dir).open()
    assert "shm_dir" in caught.value.remedy


# -- locks


def test_a_directory_lock_is_taken_once_and_given_back(shm_path: Path) -> None:
    with DirectoryLock(shm_path) as lock:
        assert lock.held
        with pytest.raises(CallerError, match=f"pid {os.getpid()}"):
            DirectoryLock(shm_path).acquire()
        with pytest.raises(ValueError, match="already"):
            lock.acquire()
    assert not lock.held
    lock.release()
    with DirectoryLock(shm_path):
        pass


_HOLD_LOCK = """
    import fcntl, os, sys
    file = open(sys.argv[1], "a+b")
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
    child = os.fork() if sys.argv[2] == "fork" else 1
    if child == 0:
        sys.stdin.readline()
        os._exit(0)
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_trainer_is_alive_while_it_holds_its_lock(shm_path: Path) -> None:
    lock = shm_path / "trainer-0.lock"
    assert trainer_holding(lock) is None
    with child(_HOLD_LOCK, lock, "alone") as process:
        assert trainer_holding(lock) is not None
        assert trainer_holding(lock) is not None
        process.kill()
        process.wait()
        assert trainer_holding(lock) is None
    assert lock.exists()


def test_a_forked_loader_does_not_keep_a_dead_trainer_alive(shm_path: Path) -> None:
    lock = shm_path / "trainer-0.lock"
    with child(_HOLD_LOCK, lock, "fork") as process:
        assert trainer_holding(lock) is not None
        process.kill()
        process.wait()
        # The forked process lives: it still waits for a line on the same pipe.
        assert trainer_holding(lock) is None
