"""Which code runs: real daemons with ISA-L, without it, and side by side in one group."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotd.cli import main
from tests.integration.cluster import Cluster, Node
from tests.integration.ranks import Job, homes

Make = Callable[..., Cluster]


@pytest.fixture
def without_isal(tmp_path: Path) -> dict[str, str]:
    """An environment whose pyeclib holds no library."""
    record = tmp_path / "pyeclib-9.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: pyeclib\nVersion: 9\n")
    (record / "RECORD").write_text("")
    paths = [str(tmp_path), *sys.path]
    environ = {"PYTHONPATH": ":".join(filter(None, paths))}
    probe = "from snapshotd.coding.choice import choose_codec; print(choose_codec().codec.name)"
    ran = subprocess.run(
        [sys.executable, "-c", probe], env=environ, check=True, capture_output=True, text=True
    )
    if not ran.stdout.startswith("zfec"):
        pytest.skip("this system has an ISA-L of its own")
    return environ


def shown(node: Node, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["status", "--address", node.address, *options]) == 0
    return capsys.readouterr().out


def test_nodes_with_and_without_isal_restore_from_each_other(
    cluster: Make,
    without_isal: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    made = cluster(parity=1, group_size=3)
    fast, bare, told = nodes = [made.node(f"n{i}") for i in range(3)]
    fast.start(SNAPSHOTD_PROTECTION__CODING="isal")
    bare.start(**without_isal)
    told.start(SNAPSHOTD_PROTECTION__CODING="zfec")
    made.met()
    assert fast.status().coding.startswith("ISA-L 2.")
    assert json.loads(shown(fast, capsys, "--json"))["coding"].startswith("ISA-L 2.")
    assert "code by ISA-L 2." in shown(fast, capsys)
    assert "the code is computed by ISA-L 2." in fast.tail()
    assert bare.status().coding.startswith("zfec ")
    assert [note for note in bare.status().notes if "install pyeclib" in note]
    assert "at a tenth of ISA-L's speed" in shown(bare, capsys)
    assert "at a tenth of ISA-L's speed" in bare.tail()
    assert told.status().coding.startswith("zfec ")
    assert not [note for note in told.status().notes if "ISA-L" in note], "as it was told"

    job = Job(homes(nodes))
    job.restore()
    job.train_protected(3)
    # Each of the stripes was coded by another node, and each lost shard is decoded by another.
    for lost in range(3):
        job.vanish()
        nodes[lost].lose()
        nodes[lost].run_dir.mkdir()
        nodes[lost].start()
        made.met()
        job = Job(homes(nodes))
        restored = job.restore()
        assert restored[lost] is not None
        assert restored[lost].bytes_decoded > 0
        job.check()
        job.train_protected(2)
        job.check()
    job.close()


def test_isal_that_is_asked_for_and_not_there_is_an_error_of_the_configuration(
    cluster: Make, without_isal: dict[str, str]
) -> None:
    node = cluster(parity=0).node("n0")
    node.launch(SNAPSHOTD_PROTECTION__CODING="isal", **without_isal)
    assert node.process is not None
    assert node.process.wait(60) == 2
    said = node.tail()
    assert "protection.coding = 'isal', but the code cannot be computed by ISA-L" in said
    assert "or set protection.coding to auto or zfec" in said
    assert "Traceback" not in said
