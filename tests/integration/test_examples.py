"""Each example is killed in the middle of a step, started again, ends as if nothing had been."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import Cluster, Node

EXAMPLES = Path(__file__).parents[2] / "examples"
Make = Callable[..., Cluster]


@dataclass
class Run:
    """What one start of an example printed."""

    status: int
    text: str
    losses: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.losses = re.findall(r"step (\d+) loss (\S+)", self.text)

    def resumed_after(self) -> int | None:
        found = re.search(r"resumed after step (\d+)", self.text)
        return int(found[1]) if found else None

    def finals(self) -> list[str]:
        """Of all ranks, in any order."""
        return sorted(re.findall(r"final (\w+)", self.text))


def begin(node: Node, job: str, script: str, *args: str, die_at: int = 0, ranks: int = 0):
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-id", job]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["--max-restarts", "1"]
    environ = {
        **os.environ,
        "SNAPSHOTD_JOB": job,
        "SNAPSHOTD_RUN_DIR": str(node.run_dir),
        "DIE_AT_STEP": str(die_at or ""),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        # Workers that torchrun starts again must not find the keys of those before them.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command += ["-m", "tests.integration.dying", str(EXAMPLES / script), *args]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environ,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], timeout_s: float = 120.0) -> Run:
    try:
        text, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(process.communicate()[0]) from None
    return Run(process.returncode, text)


def killed_and_resumed(cluster: Make, script: str, *args: str, die_at: int) -> None:
    """On one process."""
    node, other = (cluster(parity=0).start(1)[0] for _ in range(2))
    undisturbed = begin(other, "reference", script, *args)  # beside the other
    disturbed = end(begin(node, "job", script, *args, die_at=die_at))
    assert disturbed.status == -9, disturbed.text
    resumed = end(begin(node, "job", script, *args))
    reference = end(undisturbed)
    assert reference.status == 0, reference.text
    assert resumed.status == 0, resumed.text
    assert reference.resumed_after() is None
    after = resumed.resumed_after()
    assert after is not None, resumed.text
    assert 1 <= after < die_at
    compare(reference, disturbed, resumed)


def killed_under_torchrun(cluster: Make, script: str, *args: str, die_at: int) -> None:
    """On two ranks, of which one dies; torchrun starts both again."""
    node, other = (cluster(parity=0).start(1)[0] for _ in range(2))
    undisturbed = begin(other, "reference", script, *args, ranks=2)
    disturbed = end(begin(node, "job", script, *args, die_at=die_at, ranks=2))
    reference = end(undisturbed)
    assert reference.status == 0, reference.text
    assert disturbed.status == 0, disturbed.text
    after = disturbed.resumed_after()
    assert after is not None, disturbed.text
    assert 0 < after < die_at
    compare(reference, disturbed)


def compare(reference: Run, *others: Run) -> None:
    """Every loss of the others is one of the reference's, and so is the end."""
    assert len(reference.losses) > 4
    for other in others:
        assert other.losses, other.text
        assert set(other.losses) <= set(reference.losses)
    assert set(reference.losses) == {loss for other in others for loss in other.losses}
    assert reference.finals() == others[-1].finals() != []


def needs(module: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None,
        reason=f"{module} is not installed: pip install {package}",
    )


def in_either_epoch(first: int, second: int) -> list[Any]:
    """Steps in the first epoch of ten, and in the second."""
    return [pytest.param(first, marks=pytest.mark.extended), second]


@needs("transformers", "snapshotd[hf]")
@pytest.mark.parametrize("die_at", in_either_epoch(6, 14))
def test_hugging_face_trainer(cluster: Make, tmp_path: Path, die_at: int) -> None:
    killed_and_resumed(cluster, "hf_trainer.py", f"--out={tmp_path}", die_at=die_at)


@needs("accelerate", "snapshotd[accelerate]")
@pytest.mark.parametrize("die_at", in_either_epoch(6, 15))
def test_accelerate(cluster: Make, die_at: int) -> None:
    killed_and_resumed(cluster, "accelerate_loop.py", die_at=die_at)


@needs("lightning", "snapshotd[lightning]")
@pytest.mark.parametrize("die_at", in_either_epoch(6, 15))
def test_lightning(cluster: Make, tmp_path: Path, die_at: int) -> None:
    killed_and_resumed(cluster, "lightning_fit.py", f"--out={tmp_path}", die_at=die_at)


@needs("transformers", "snapshotd[hf]")
def test_hugging_face_trainer_on_two_ranks(cluster: Make, tmp_path: Path) -> None:
    killed_under_torchrun(cluster, "hf_trainer.py", f"--out={tmp_path}", die_at=8)


@needs("accelerate", "snapshotd[accelerate]")
def test_accelerate_on_two_ranks(cluster: Make) -> None:
    killed_under_torchrun(cluster, "accelerate_loop.py", die_at=8)


@needs("lightning", "snapshotd[lightning]")
def test_lightning_on_two_ranks(cluster: Make, tmp_path: Path) -> None:
    killed_under_torchrun(cluster, "lightning_fit.py", f"--out={tmp_path}", die_at=8)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("hf_trainer.py", marks=needs("transformers", "snapshotd[hf]")),
        pytest.param(
            "accelerate_loop.py",
            marks=[needs("accelerate", "snapshotd[accelerate]"), pytest.mark.extended],
        ),
        pytest.param(
            "lightning_fit.py",
            marks=[needs("lightning", "snapshotd[lightning]"), pytest.mark.extended],
        ),
    ],
)
def test_a_place_in_the_data_is_refused_to_another_number_of_ranks(
    cluster: Make, tmp_path: Path, script: str
) -> None:
    node = cluster(parity=0).start(1)[0]
    out = [] if script == "accelerate_loop.py" else [f"--out={tmp_path}"]
    assert end(begin(node, "job", script, *out, die_at=4)).status == -9
    more = end(begin(node, "job", script, *out, ranks=2))
    assert more.status != 0, more.text
    assert "was saved by 1 ranks, and another number trains now" in more.text


@needs("torchdata", "torchdata")
def test_ddp(cluster: Make) -> None:
    killed_under_torchrun(cluster, "ddp.py", die_at=17)


def test_titan(cluster: Make) -> None:
    killed_under_torchrun(cluster, "titan.py", die_at=8)


@needs("deepspeed", "deepspeed")
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_zero(cluster: Make, stage: int) -> None:
    killed_under_torchrun(cluster, "deepspeed_zero.py", f"--stage={stage}", die_at=8)
