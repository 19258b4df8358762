"""sd_notify against a real datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd.telemetry.notify import Notifier, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    abstract = request.param == "abstract"
    address = f"@snapshotd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if abstract else address)
        listener.settimeout(10)
        yield address, listener


def test_each_message_is_one_datagram(manager: tuple[str, socket.socket]) -> None:
    address, listener = manager
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": address})
    sent = [
        (notifier.ready("serving\non 10.0.0.1"), b"READY=1\nSTATUS=serving on 10.0.0.1"),
        (notifier.ready(), b"READY=1"),
        (notifier.watchdog(), b"WATCHDOG=1"),
        (notifier.status("2 of 3 peers"), b"STATUS=2 of 3 peers"),
        (notifier.stopping(), b"STOPPING=1"),
    ]
    for taken, expected in sent:
        assert taken
        assert listener.recv(4096) == expected


def test_without_a_manager_nothing_happens() -> None:
    assert not Notifier.from_environ({}).ready()


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    assert not Notifier(str(address)).ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(address))
    assert not Notifier(str(address)).watchdog()


def test_a_manager_that_does_not_read_never_stops_us(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(address))
        notifier = Notifier(str(address))
        results = [notifier.watchdog() for _ in range(10_000)]
    assert results[0]
    assert not results[-1]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], expected: float | None) -> None:
    assert watchdog_interval_s(environ, pid=7) == expected
