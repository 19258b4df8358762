"""The demo's nodes on paper: configurations that the daemon takes, replacements nobody lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotd.config import load
from snapshotd_client.demo.__main__ import main
from snapshotd_client.demo.cluster import Cluster, RunPlan, agent_command
from snapshotd_client.demo.inbox import Inbox


@pytest.fixture
def plan(tmp_path: Path, shm_path: Path) -> RunPlan:
    return RunPlan(
        name="m1",
        parity=1,
        steps=4,
        step_s=0.1,
        logs=tmp_path / "logs",
        scratch=tmp_path / "s",
        shm=shm_path / "m1",
        rendezvous_port=4000,
    )


def test_configurations_are_valid_and_apart(plan: RunPlan, tmp_path: Path) -> None:
    with Inbox(tmp_path) as inbox:
        nodes = Cluster(plan, inbox).add_first_nodes()
    configs = [load(node.config, {}, {}).config for node in nodes]
    for config in configs:
        assert set(config.peers) == {"n0", "n1", "n2", "n3"}
        assert config.protection.parity == 1
    for key in ("node_id", "listen", "run_dir", "shm_dir"):
        assert len({getattr(config, key) for config in configs}) == 4


def test_replacement_knows_two_live_nodes_and_nobody_knows_it(
    plan: RunPlan, tmp_path: Path
) -> None:
    with Inbox(tmp_path) as inbox:
        cluster = Cluster(plan, inbox)
        first = cluster.add_first_nodes()
        cluster.lose(first[:1])
        replacement = cluster.add_replacement()
    config = load(replacement.config, {}, {}).config
    assert config.node_id == "n4"
    assert set(config.peers) == {"n1", "n2"}
    assert all("n4" not in node.config.read_text() for node in first)
    assert (
        str(tmp_path)
        in agent_command(plan, replacement)[agent_command(plan, replacement).index("--log-dir") + 1]
    )
    assert replacement.host not in {node.host for node in first}


def test_lost_node_loses_its_memory(plan: RunPlan, tmp_path: Path) -> None:
    with Inbox(tmp_path) as inbox:
        cluster = Cluster(plan, inbox)
        lost, *rest = cluster.add_first_nodes()
        for node in (lost, *rest):
            node.shm_dir.mkdir(parents=True)
        cluster.lose([lost])
        assert not lost.shm_dir.exists()
        assert all(node.shm_dir.exists() for node in rest)
        cluster.stop()
    assert not any(node.shm_dir.exists() for node in rest)


def test_trainers_without_daemons_are_told_so(plan: RunPlan, tmp_path: Path) -> None:
    with Inbox(tmp_path) as inbox:
        node = Cluster(plan, inbox).add_first_nodes()[0]
    assert "--unprotected" not in agent_command(plan, node)
    reference = RunPlan(**{**vars(plan), "parity": None})
    assert "--unprotected" in agent_command(reference, node)


def test_directory_of_somebody_else_is_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["--out", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "wrong",
    [["--parity", "4"], ["--parity", "1,1"], ["--parity", "x"], ["--faults", "flood"]],
)
def test_wrong_arguments_are_refused(wrong: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(wrong)
    assert caught.value.code == 2
    assert wrong[0] in capsys.readouterr().err
