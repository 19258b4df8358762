"""Log records as text and as JSON, and reasons once per change."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest

from snapshotd.telemetry.logs import ChangeLog, configure

log = logging.getLogger("snapshotd.test")


@pytest.fixture(autouse=True)
def root_logger_given_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = tuple(root.handlers), root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


def configured(log_format: Literal["text", "json"]) -> io.StringIO:
    stream = io.StringIO()
    configure("info", log_format, "n0", stream)
    return stream


def test_text() -> None:
    stream = configured("text")
    log.info("sealed %d bytes", 5, extra={"job": "gpt", "step": 7})
    log.debug("not written")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("Z INFO snapshotd.test: sealed 5 bytes [node=n0 job=gpt step=7]")


def test_json_is_one_object_a_line() -> None:
    stream = configured("json")
    log.warning("line\nbreak", extra={"slot": 0, "epoch": 2})
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "warning",
        "logger": "snapshotd.test",
        "message": "line\nbreak",
        "node": "n0",
        "slot": 0,
        "epoch": 2,
    }
    assert "ValueError: why" in second["error"]


def test_a_second_configuration_replaces_the_first() -> None:
    first, second = configured("text"), configured("text")
    log.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_a_reason_is_logged_once_per_change() -> None:
    stream = configured("text")
    changes = ChangeLog(log)
    said = [
        changes.note("shard 0", reason)
        for reason in ("", "waits for n1", "waits for n1", "waits for n2", "", "", "waits for n2")
    ]
    assert said == [False, True, False, True, True, False, True]
    lines = stream.getvalue().splitlines()
    assert [line.partition("shard 0: ")[2].partition(" [")[0] for line in lines] == [
        "waits for n1",
        "waits for n2",
        "waits for n2",
    ]
    changes.forget("shard 0")
    assert changes.note("shard 0", "waits for n2", logging.WARNING, slot=3)
    assert "slot=3" in stream.getvalue().splitlines()[-1]
