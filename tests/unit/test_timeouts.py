"""docs/timeouts.md says what the code does: every bound, its default, and the order."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import snapshotd
import snapshotd_client
from snapshotd.cli import parser
from snapshotd.config import Timeouts, load
from snapshotd.config.sources import known_keys
from snapshotd.errors import ConfigError
from snapshotd_client import Snapshotter

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "timeouts.md").read_text(encoding="utf-8")
UNIT = (ROOT / "deploy" / "systemd" / "snapshotd.service").read_text(encoding="utf-8")
ESSENTIAL = {"cluster_id": "c", "node_id": "n", "listen": "127.0.0.1:7070"}
#: What the table leaves out: the demonstration is no part of the daemon or of a trainer.
NOT_OURS = ("snapshotd_client.demo", "snapshotd.wire.v1")


@dataclass(frozen=True)
class Row:
    name: str
    default: float
    bounds: str
    outcome: str
    longer_than: tuple[str, ...]


def rows() -> dict[str, Row]:
    found = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`"):
            name = cells[0].strip("`")
            assert name not in found, f"{name} stands twice"
            below = tuple(re.findall(r"`([^`]+)`", cells[4]))
            found[name] = Row(name, float(cells[1]), cells[2], cells[3], below)
    return found


ROWS = rows()


def real_default(name: str) -> float:
    """What the code, the unit or the command says."""
    if name in known_keys():
        return float(known_keys()[name].default)
    if match := re.fullmatch(r"snapshotd\.service (\w+)", name):
        (text,) = re.findall(rf"^{match[1]}=(.+)$", UNIT, re.MULTILINE)
        number, unit = re.fullmatch(r"(\d+)(s|min)", text).groups()
        return float(number) * {"s": 1, "min": 60}[unit]
    if match := re.fullmatch(r"snapshotd (\w+) --([\w-]+)", name):
        arguments = ["run"] if match[1] == "run" else [match[1]]
        return float(getattr(parser().parse_args(arguments), match[2].replace("-", "_")))
    if match := re.fullmatch(r"Snapshotter(?:\.(\w+))? (\w+)", name):
        function = getattr(Snapshotter, match[1] or "__init__")
        return float(inspect.signature(function).parameters[match[2]].default)
    module, _, constant = name.rpartition(".")
    return float(getattr(importlib.import_module(module), constant))


def constants() -> set[str]:
    """Every module constant of seconds, of the daemon and of the trainer's side."""
    found = set()
    for package in (snapshotd, snapshotd_client):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if module.name.startswith(NOT_OURS) or module.name.endswith("__main__"):
                continue
            source = Path(inspect.getsourcefile(importlib.import_module(module.name)) or "")
            text = source.read_text(encoding="utf-8")
            names = re.findall(r"^(_?[A-Z][A-Z0-9_]*_S)\b[^=\n]*=", text, re.MULTILINE)
            found |= {f"{module.name}.{name}" for name in names}
    return found


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_is_true(name: str) -> None:
    row = ROWS[name]
    assert row.default == real_default(name)
    assert row.bounds
    for below in row.longer_than:
        assert row.default > ROWS[below].default, f"{name} is not longer than {below}"


def test_every_bound_has_a_row() -> None:
    keys = {f"timeouts.{name}" for name in Timeouts.model_fields}
    assert keys - set(ROWS) == set()
    assert len(constants()) > 20
    assert constants() - set(ROWS) == set()


@pytest.mark.parametrize(
    ("name", "below"),
    [
        (row.name, below)
        for row in ROWS.values()
        for below in row.longer_than
        if row.name.startswith("timeouts.") and below.startswith("timeouts.")
    ],
)
def test_an_order_in_the_table_is_checked_at_start(name: str, below: str) -> None:
    flags = ESSENTIAL | {name: str(ROWS[below].default)}
    with pytest.raises(ConfigError, match=rf"{name} = .*{below.rpartition('.')[2]}"):
        load(None, flags, {})
