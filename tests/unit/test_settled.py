"""A checked configuration goes to the daemon's program, which does without what checked it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from snapshotd import settled
from snapshotd.config import load


def test_it_comes_back_as_it_was(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(
        'cluster_id = "c"\nnode_id = "n0"\nlisten = "127.0.0.1:7000"\nmemory_budget = "1GiB"\n'
        '[peers]\npath = "127.0.0.2:7000"\nsection = "127.0.0.3:7000"\n'
        '[tls]\nca = "/a"\ncert = "/b"\nkey = "/c"\n'
    )
    config = load(file, {"protection.parity": "2"}, {}).config
    back = settled.from_text(settled.to_text(config))
    for name, value in config:
        mine = getattr(back, name)
        assert (vars(mine) == dict(value)) if hasattr(mine, "__dict__") else (mine == value), name
    assert back.peers == {"path": "127.0.0.2:7000", "section": "127.0.0.3:7000"}
    assert (back.run_dir, back.tls.ca) == (Path("/run/snapshotd"), Path("/a"))
    assert (back.memory_budget, back.protection.parity, back.oom_score_adj) == (1 << 30, 2, None)


def test_neither_program_loads_what_checks():
    code = "import sys, snapshotd.smp, snapshotd.daemon; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
