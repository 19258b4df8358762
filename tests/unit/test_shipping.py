"""`snapshotd export` and `import`: what they refuse, what they leave behind when they fail."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.progress import Progress

from snapshotd.cli import export, main, parser, shipping
from snapshotd.cli.shipping import trainers_side
from snapshotd.errors import SnapshotdError
from snapshotd.rpc import fetching, operator
from snapshotd.tier.reading import TierError
from snapshotd.tier.store import Store
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    path = tmp_path / "tier"
    path.mkdir()
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    dcp.save({"model": {"w": torch.ones(9)}}, checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "--job", "j", "--to", "", "x"], "has no URL"),
        (["import", "--job", "j", "--to", "tier", "x"], "it is a relative path"),
        (["import", "--job", "j", "--to", "memory://t", "x"], "one process's memory"),
        (["import", "--job", "j", "--to", "/", "--step", "-5", "x"], "--step -5. Give a step of 0"),
        (["import", "--job", "j", "--to", "/", "--step", "9" * 30, "x"], "Give a step of 0 to"),
        (["import", "--job", "j", "--to", "/", "--world", "0", "x"], "--world 0. Give 1 to"),
        (["export", "--job", "j", "--from", "", "x"], "has no URL"),
        (["export", "--job", "j", "--from", "tier", "x"], "it is a relative path"),
    ],
)
def test_arguments_that_cannot_be_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_an_export_says_what_is_not_there(
    capsys: pytest.CaptureFixture[str], tier: Path, checkpoint: Path
) -> None:
    def export(job: str, step: str, target: Path) -> str:
        command = ["export", "--from", str(tier), "--job", job, "--step", step, str(target)]
        assert main(command) != 0
        return capsys.readouterr().err

    assert "has no whole step of a job 'j'" in export("j", "newest", tier / "x")
    assert main(["import", "--job", "j", "--to", str(tier), str(checkpoint)]) == 0
    assert "has no whole step of a job 'k'" in export("k", "newest", tier / "x")
    assert "step 7 is not in" in export("j", "7", tier / "x")
    for step in ("²", "9" * 5000):
        assert "Name a step by its number" in export("j", step, tier / "x")
    assert "whose parent is there" in export("j", "newest", tier / "a" / "b")
    (index,) = tier.glob("j/steps/*")
    index.write_text("{}")
    assert index.name in export("j", "newest", tier / "x")


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_left(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tier: Path,
    checkpoint: Path,
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise TierError("no space") from full

    with monkeypatch.context() as patched:
        patched.setattr(Store, "publish", fail)
        assert main(["import", "--job", "j", "--to", str(tier), str(checkpoint)]) == 1
    assert "no space" in capsys.readouterr().err
    assert not [path for path in tier.rglob("*") if path.is_file()]
    assert main(["import", "--job", "j", "--to", str(tier), str(checkpoint)]) == 0

    def no_room(*_: object) -> None:
        raise full

    monkeypatch.setattr(Store, "read", no_room)
    assert main(["export", "--job", "j", "--from", str(tier), str(tier / "out")]) == 1
    assert "No space left on device. Make room" in capsys.readouterr().err
    assert sorted(path.name for path in tier.iterdir()) == ["j"]


def test_a_trainers_side_that_says_much_does_not_stand_still(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "talker.py").write_text(
        "import sys\nsys.stderr.write('x' * 80 + '\\n' + 'y' * (1 << 20) + '\\n')\n"
        "print('{\"done\": {\"n\": 1}}')\nsys.exit('end' in sys.argv[1])\n"
    )
    monkeypatch.setattr(shipping, "MODULE", "talker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    progress = Progress(disable=True)
    task = progress.add_task("x")
    assert trainers_side({"what": "x"}, progress, task) == {"n": 1}
    with pytest.raises(SnapshotdError, match="end failed: y"):
        trainers_side({"what": "end"}, progress, task)


#: Takes the place of the trainer's side: says that it is there, and never ends by itself.
_SLEEPER = """
import json, signal, sys
request = json.loads(sys.argv[1])
open(request["directory"] + "/begun", "xb").close()
line = open({line!r}, "wb")
line.write(b"here")
line.flush()
signal.pause()
"""

_COMMAND = """
import sys
from snapshotd.cli import main, shipping
shipping.MODULE = "sleeper"
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("import", signal.SIGTERM),
        ("import", signal.SIGINT),
        ("import", signal.SIGHUP),
        ("export", signal.SIGTERM),
    ],
)
def test_a_command_that_is_ended_leaves_nothing(
    tmp_path: Path, tier: Path, checkpoint: Path, command: str, number: signal.Signals
) -> None:
    if command == "export":
        assert main(["import", "--job", "j", "--to", str(tier), str(checkpoint)]) == 0
        arguments = [command, "--from", str(tier), "--job", "j", str(tmp_path / "out")]
    else:
        arguments = [command, "--job", "j", "--to", str(tier), str(checkpoint)]
    line, scratch = tmp_path / "line", tmp_path / "scratch"
    os.mkfifo(line)
    scratch.mkdir()
    (tmp_path / "sleeper.py").write_text(_SLEEPER.format(line=str(line)))
    there = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    environment = os.environ | {
        "TMPDIR": str(scratch),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    started = [sys.executable, "-c", _COMMAND, *arguments]
    with subprocess.Popen(started, env=environment) as process, line.open("rb") as heard:
        assert heard.read(4) == b"here"
        process.send_signal(number)
        assert process.wait() == 128 + number
        assert heard.read() == b"", "the trainer's side is still there"
    assert {p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts} == there


def test_an_export_has_so_many_threads_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world, counts = 300, set()
    committed = seg.Version(epoch=1, step=5)
    status = pb.NodeStatus(jobs=[pb.JobFacts(job="j", world=world, committed=committed)])
    status.members.add(state="live", address="n")
    held = [pb.DataHolding(job="j", shard=s, version=committed) for s in range(world)]
    facts = pb.NodeFacts(node="n", slots=[pb.SlotFacts(address="a", data=held)])

    def fetch(*_: object) -> Iterator[seg.SealRecord | bytes]:
        yield seg.SealRecord(manifest_bytes=1, image_bytes=3)
        counts.add(threading.active_count())
        threading.Event().wait(0.1)  # others begin meanwhile
        yield b"abc"

    monkeypatch.setattr(operator, "fetch_status", lambda *_: status)
    monkeypatch.setattr(operator, "fetch_facts", lambda *_: facts)
    monkeypatch.setattr(fetching, "fetch_image", fetch)
    arguments = parser().parse_args(["export", "--address", "127.0.0.1:1", "x"])
    arguments.step = None
    source = export._memory(arguments)
    before = threading.active_count()
    assert export._bring(source, tmp_path, Progress(disable=True)) == [1] * world
    assert max(counts) <= before + 64
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"abc"}
