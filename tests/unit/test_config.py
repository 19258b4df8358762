"""A configuration is right and traceable, or refused with a message that helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from snapshotd.config import Config, LoadedConfig, load
from snapshotd.errors import ConfigError

BASE = 'cluster_id = "c"\nnode_id = "n0"\nlisten = "10.0.0.1:7070"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "snapshotd.toml"


def loaded(
    file: Path,
    text: str,
    flags: dict[str, str] | None = None,
    environ: dict[str, str] | None = None,
) -> LoadedConfig:
    file.write_text(BASE + text)
    return load(file, flags or {}, environ or {})


def test_the_issue_s_example(file: Path) -> None:
    config = loaded(
        file,
        'run_dir = "/run/x"\nshm_dir = "/dev/shm/x"\nmemory_budget = "400GiB"\n'
        '[peers]\nn0 = "10.0.0.1:7070"\nn1 = "10.0.0.2:7070"\n'
        "[protection]\ngroup_size = 8\nparity = 2\n",
    ).config
    assert config.memory_budget == 400 << 30
    assert config.peers == {"n0": "10.0.0.1:7070", "n1": "10.0.0.2:7070"}
    assert (config.protection.group_size, config.protection.parity) == (8, 2)
    assert config.state_dir == config.run_dir == Path("/run/x")


def test_defaults_hold_together() -> None:
    config = Config(cluster_id="c", node_id="n0", listen="localhost:1")
    assert config.protection.parity < config.protection.group_size
    assert config.memory_budget > 0
    assert config.generations == 2
    with pytest.raises(ValidationError):
        config.node_id = "other"


def test_flags_beat_variables_beat_the_file_beat_defaults(file: Path) -> None:
    effective = loaded(
        file,
        "generations = 3\n[timeouts]\nrpc_s = 11\n[protection]\nparity = 1\n",
        {"protection.parity": "3"},
        {"SNAPSHOTD_PROTECTION__PARITY": "2", "SNAPSHOTD_TIMEOUTS__RPC_S": "12.5"},
    )
    values = effective.values()
    origins = {key: str(origin) for key, origin in effective.origins.items()}
    assert values["protection.parity"] == 3
    assert origins["protection.parity"] == "flag --protection.parity"
    assert values["timeouts.rpc_s"] == 12.5
    assert origins["timeouts.rpc_s"] == "variable SNAPSHOTD_TIMEOUTS__RPC_S"
    assert values["generations"] == 3
    assert origins["generations"] == f"{file}:4"
    assert origins["protection.group_size"] == "default"
    assert values.keys() == origins.keys()


def test_peers_merge_one_by_one(file: Path) -> None:
    effective = loaded(
        file,
        '[peers]\nn1 = "10.0.0.2:1"\n"rack.n2" = "10.0.0.3:1"\n',
        {"peers.n1": "10.0.0.9:1"},
        {"SNAPSHOTD_PEERS": "n3=10.0.0.4:1, n4=10.0.0.5:1", "SNAPSHOTD_PEERS__n5": "h:1"},
    )
    assert effective.config.peers == {
        "n1": "10.0.0.9:1",
        "rack.n2": "10.0.0.3:1",
        "n3": "10.0.0.4:1",
        "n4": "10.0.0.5:1",
        "n5": "h:1",
    }
    assert str(effective.origins["peers.rack.n2"]) == f"{file}:6"


def test_without_a_file() -> None:
    flags = {"cluster_id": "c", "node_id": "n", "listen": "[fd00::1]:7070"}
    assert load(None, flags, {}).config.listen == "[fd00::1]:7070"


def test_an_optional_number_is_read_from_text() -> None:
    flags = {"cluster_id": "c", "node_id": "n", "listen": "h:1", "oom_score_adj": "-5"}
    assert load(None, flags, {}).config.oom_score_adj == -5
    flags["oom_score_adj"] = "low"
    with pytest.raises(ConfigError, match=r"oom_score_adj = 'low' .*valid integer"):
        load(None, flags, {})


def test_variables_of_trainers_are_not_ours(file: Path) -> None:
    names = ("JOB", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environ = {f"SNAPSHOTD_{name}": "0" for name in names}
    environ["SNAPSHOTD_RUN_DIR"] = "/run/y"
    assert loaded(file, "", environ=environ).config.run_dir == Path("/run/y")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("paritty = 1\n", r"paritty \(.*:4\) is an unknown key.*protection\.parity.*Mend .*:4"),
        ("[protection]\nburp = 1\n", r"protection\.burp \(.*:5\) is an unknown key"),
        ('[protection]\nparity = "1"\n', r"protection\.parity = '1' \(.*:5\).*valid integer"),
        ("generations = true\n", r"generations = True \(.*:4\).*valid integer"),
        ("generations = 1\n", r"generations = 1 .*greater than or equal to 2"),
        ("protection = 4\n", r"protection: expected a table|protection = 4 .*a table"),
        ('peers = "n1"\n', r"peers.*a table"),
        ('[protection]\ncoding = "jerasure"\n', r"coding = 'jerasure' \(.*:5\).*'auto', 'isal'"),
        ("[protection]\nparity = 4\n", r"parity = 4 \(.*:5\).*no room.*expected 0 to 3"),
        ("[protection]\ngroup_size = 33\n", r"group_size = 33.*less than or equal to 32"),
        ("[protection]\ngroup_size = 1\n", r"group_size = 1 .*greater than or equal to 2"),
        ("[protection]\nparity = -1\n", r"parity = -1 .*greater than or equal to 0"),
        ('[background]\ncpus = "3-1"\n', r"cpus = '3-1' .*does not rise.*expected auto, all"),
        ("[background]\nnice = 20\n", r"nice = 20 .*less than or equal to 19"),
        ('run_dir = "here"\n', r"run_dir = 'here' .*absolute path"),
        ('memory_budget = "lots"\n', r"memory_budget = 'lots' .*400GiB"),
        ("memory_budget = 0\n", r"memory_budget = 0 .*greater than 0"),
        ("oom_score_adj = 1001\n", r"oom_score_adj = 1001 .*less than or equal to 1000"),
        ('oom_score_adj = "0"\n', r"oom_score_adj = '0' .*valid integer"),
        ('log_level = "loud"\n', r"log_level = 'loud' .*'debug', 'info'"),
        ("[timeouts]\nheartbeat_s = 0\n", r"heartbeat_s = 0 .*greater than 0"),
        ("[timeouts]\nrpc_s = inf\n", r"rpc_s = inf .*finite"),
        ("[timeouts]\ndead_s = 3\n", r"dead_s = 3 \(.*:5\).*suspect_s < dead_s < restore_s"),
        (
            "[timeouts]\nheartbeat_s = 5\n",
            r"suspect_s = 3\.0 \(default\).*heartbeat_s comes from .*:5",
        ),
        ("[timeouts]\nrpc_s = 1\n", r"rpc_s = 1 \(.*:5\).*heartbeat_s < rpc_s <= restore_s / 2"),
        ("[timeouts]\nrpc_s = 61\n", r"rpc_s = 61 \(.*:5\).*half of restore_s, 120\.0"),
        (
            "[timeouts]\nrestore_s = 19\n",
            r"rpc_s = 10\.0 \(default\).*restore_s comes from .*:5",
        ),
        ('[peers]\nn1 = "a:1"\nn1 = "b:1"\n', r"node id peers\.n1 is set twice, in lines 5 and 6"),
        ('[peers]\nn1 = "a:1"\nn2 = "A:1"\n', r"n1 and n2 have the same address"),
        ('[peers]\nn1 = "10.0.0.1:7070"\n', r"n1 and n0 have the same address"),
        ('[peers]\nn0 = "10.0.0.2:7070"\n', r"n0 is this node and listens on 10\.0\.0\.1:7070"),
        ('[peers]\n"b d" = "a:1"\n', r"peers\.b d.*letters, digits"),
        ('[peers]\nn1 = "a"\n', r"peers\.n1 = 'a' \(.*:5\).*host:port"),
        ("listen 4\n", r"not valid TOML"),
        ("[protection]\n[protection]\n", r"not valid TOML"),
    ],
)
def test_wrong_files(file: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(file, text)
    assert re.search(says, str(caught.value), re.DOTALL)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        ":7070",
        "h:",
        "h:0",
        "h:65536",
        "h:x",
        "0.0.0.0:1",
        "[::]:1",
        "fd00::1:1",
        "10.0.0.256:1",
        "a b:1",
        "-a:1",
        "h:\u0661",
    ],
)
def test_wrong_addresses(address: str) -> None:
    flags = {"cluster_id": "c", "node_id": "n", "listen": address}
    with pytest.raises(ConfigError, match=r"(?s)listen = .*flag --listen.*expected host:port"):
        load(None, flags, {})


def test_wrong_variables_and_flags(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"variable SNAPSHOTD_NOD_ID\) is an unknown.*node_id"):
        loaded(file, "", environ={"SNAPSHOTD_NOD_ID": "x"})
    with pytest.raises(ConfigError, match=r"variable SNAPSHOTD_GENERATIONS\).*valid integer"):
        loaded(file, "", environ={"SNAPSHOTD_GENERATIONS": "two"})
    with pytest.raises(ConfigError, match=r"stands twice \(variable SNAPSHOTD_PEERS\)"):
        loaded(file, "", environ={"SNAPSHOTD_PEERS": "n1=a:1,n1=b:1"})
    with pytest.raises(ConfigError, match=r"names no peer"):
        loaded(file, "", environ={"SNAPSHOTD_PEERS": "a:1"})
    with pytest.raises(ConfigError, match=r"--set x=\.\.\.\) is an unknown key"):
        loaded(file, "", {"x": "1"})
    with pytest.raises(ConfigError, match=r"protection\.parity = 'x' \(flag --protection\.parity"):
        loaded(file, "", {"protection.parity": "x"})


def test_all_problems_are_named_at_once(file: Path) -> None:
    file.write_text('listen = "nowhere"\nlog_format = "xml"\n')
    with pytest.raises(ConfigError) as caught:
        load(file, {}, {})
    message = str(caught.value)
    assert message.startswith("4 settings are wrong")
    for key in ("cluster_id is set nowhere", "node_id is set nowhere", "listen", "log_format"):
        assert key in message
    assert "SNAPSHOTD_CLUSTER_ID, or --cluster-id" in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load(tmp_path / "absent.toml", {}, {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load(tmp_path / "binary.toml", {}, {})
