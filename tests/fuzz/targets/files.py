"""Files that operators and earlier daemons left: job records and configurations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from snapshotd.config.load import load
from snapshotd.config.sources import known_keys
from snapshotd.errors import ConfigError, SnapshotdError
from snapshotd.flow.records import Records
from snapshotd.rpc.facts import job_to
from snapshotd.wire.v1 import node_pb2 as pb
from tests.fuzz import likely
from tests.fuzz.harness import Parts, Target
from tests.fuzz.messages import NAMES, messages, wire
from tests.fuzz.room import room, watched

_FILES = ["job.job", "other.job", "%2E%2E.job", "x\n.job", "job.half", "note.txt"]
_KINDS = ["file", "file", "file", "link", "pipe", "room", "zero", "huge"]


def records(parts: Parts) -> None:
    """Job records are read, and can be kept again; or the daemon says which file is damaged."""
    with room() as path:
        state, secret = path / "state", path / "secret"
        state.mkdir()
        secret.write_bytes(b"not yours")
        for part in parts:
            what, _, data = part.partition(b":")
            kind, _, name = what.decode("ascii", "replace").partition("=")
            if name in _FILES and not os.path.lexists(state / name):
                _place(state / name, kind, data, secret)
        with watched(state):
            _load_and_keep(state)
        assert secret.read_bytes() == b"not yours"


def _load_and_keep(state: Path) -> None:
    kept = Records(state)
    try:
        found = kept.load()
    except SnapshotdError:
        return
    kept.keep(found)
    again = Records(state).load()
    assert {j.job for j in again} >= {j.job for j in found}


def _place(path: Path, kind: str, data: bytes, secret: Path) -> None:
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "room":
        path.mkdir()
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "file":
        path.write_bytes(data)


@st.composite
def _states(draw: Any) -> list[bytes]:
    parts = []
    for name in draw(st.lists(st.sampled_from([_FILES[0], *_FILES]), max_size=3, unique=True)):
        kind = draw(st.sampled_from(_KINDS))
        whole = likely.job_facts().map(job_to) | messages(pb.JobFacts)
        data = draw(wire(whole)) if kind == "file" else b""
        parts.append(f"{kind}={name}:".encode() + data)
    return parts


def config(parts: Parts) -> None:
    """A configuration is taken, or refused with what is wrong and what to do."""
    with room() as path:
        for part in parts[:1]:
            (path / "config.toml").write_bytes(part)
            try:
                load(path / "config.toml", {}, {}).values()
            except ConfigError:
                continue


_TEXTS = st.sampled_from(
    [*NAMES, "1GiB", "-1", "9" * 40, "1e999", "nan", "debug", "json", "0.0.0.0:1", "[::]:70"]
) | st.text(max_size=12)


def _quoted(text: str) -> str:
    return '"' + "".join(c if c.isalnum() else f"\\U{ord(c):08x}" for c in text) + '"'


_RAW = ["1", "0", "-1", "true", "inf", "nan", "1e400", "[]", "[[1]]", "{}", "{a=1}", "2020-01-01"]


@st.composite
def _configs(draw: Any) -> list[bytes]:
    lines = []
    keys = [*known_keys(), "peers.n1", "peers.a.b", "peers", "protection", "timeouts", "what"]
    for key in draw(st.lists(st.sampled_from(keys), max_size=8)):
        value = draw(st.sampled_from(_RAW) | _TEXTS.map(_quoted))
        lines.append(f"{key} = {value}")
    lines += draw(
        st.lists(st.sampled_from(["[peers]", "[[peers]]", "[a.b]", "#", "x"]), max_size=1)
    )
    text = "\n".join(draw(st.permutations(lines))).encode("utf-8", "surrogatepass")
    return [text + draw(st.sampled_from([b"", b"", b"", b"\xff", b"\0", b"[", b"\n=" * 9]))]


TARGETS = [
    Target("records", _states(), records, 150),
    Target("config", _configs(), config, 150),
]
