"""The trainer's half of export and import, as a program."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotd.cli import shipping
from snapshotd.errors import SnapshotdError

TALKS = """
import json, sys
for line in range(2000):
    sys.stderr.write("a warning of some library, which nobody reads " * 3 + "\\n")
if "fail" in sys.argv[1]:
    sys.stderr.write(json.dumps({"error": "no such thing"}) + "\\n")
    sys.exit(1)
print(json.dumps({"progress": [1, 2]}))
print(json.dumps({"done": {"tensors": 3}}))
"""


@pytest.fixture
def talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that says more on standard error than a pipe holds."""
    (tmp_path / "talks.py").write_text(TALKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(shipping, "MODULE", "talks")


@pytest.mark.timeout(30)
@pytest.mark.usefixtures("talks")
def test_however_much_it_says_it_is_heard_to_the_end() -> None:
    with shipping.bars() as progress:
        task = progress.add_task("write", total=None)
        assert shipping.trainers_side({"what": "export"}, progress, task) == {"tensors": 3}
        assert progress.tasks[task].completed == 1
        with pytest.raises(SnapshotdError, match="fail failed: no such thing"):
            shipping.trainers_side({"what": "fail"}, progress, task)
