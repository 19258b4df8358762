"""What is deployed passes the tools that will read it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotd.config import load

DEPLOY = Path(__file__).parents[2] / "deploy" / "systemd"
INSTALLED = "/opt/snapshotd/bin/snapshotd"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_the_unit_is_valid(tmp_path: Path) -> None:
    text = (DEPLOY / "snapshotd.service").read_text()
    assert f"ExecStart={INSTALLED} serve --config /etc/snapshotd/config.toml\n" in text
    # The tool wants the program to exist; here it is only somewhere else.
    unit = tmp_path / "snapshotd.service"
    unit.write_text(text.replace(INSTALLED, f"{sys.executable} -m snapshotd"))
    verdict = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60
    )
    assert verdict.returncode == 0, verdict.stderr
    assert str(unit) not in verdict.stderr


@pytest.mark.skipif(not shutil.which("systemd-tmpfiles"), reason="systemd-tmpfiles is not here")
def test_the_tmpfiles_snippet_makes_a_group_writable_directory(tmp_path: Path) -> None:
    text = (DEPLOY / "snapshotd.tmpfiles.conf").read_text()
    assert "d /dev/shm/snapshotd 2770 snapshotd snapshotd -" in text
    snippet = tmp_path / "snapshotd.conf"
    # The user exists only where sysusers ran; "-" is the user who runs the tool.
    snippet.write_text(text.replace("2770 snapshotd snapshotd", "2770 - -"))
    root = tmp_path / "root"
    (root / "dev" / "shm").mkdir(parents=True)
    subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={root}", snippet], check=True, timeout=60
    )
    assert (root / "dev/shm/snapshotd").stat().st_mode & 0o7777 == 0o2770


def test_the_example_configuration_is_served() -> None:
    config = load(DEPLOY / "config.toml", {}, {}).config
    assert config.state_dir == Path("/var/lib/snapshotd")
