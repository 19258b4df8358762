"""What is asked of devices, in which order, and what is said of it: with devices that do nothing.

Only their bookkeeping is here; copies by real ones are tested where there is one (`gpu`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from snapshotd_client import copying, cuda
from snapshotd_client.copying import Load, Target, _Source

ONE, TWO = torch.device("cpu"), torch.device("meta")
BLOCK, SLICE = 100, 32


class Event:
    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def synchronize(self) -> None:
        self._log.append(f"waited for {self._name}")


class Devices:
    """Stands for torch.cuda: notes what is asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events = 0

    def stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, device)


class FakeStream:
    def __init__(self, devices: Devices, device: torch.device) -> None:
        self._devices, self._device = devices, device

    def record_event(self) -> Event:
        self._devices.events += 1
        name = f"{self._device}.{self._devices.events}"
        self._devices.log.append(f"event {name}")
        return Event(self._devices.log, name)

    def wait_event(self, event: Event) -> None:
        self._devices.log.append(f"{self._device} after {event._name}")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    made = Devices()

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", made.stream)
    monkeypatch.setattr(torch.cuda, "Stream", made.stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(copying, "ROUND_BYTES", 2 * SLICE)
    monkeypatch.setattr(copying, "TRANSFER_BYTES", SLICE)
    monkeypatch.setattr(copying, "_ROUNDS", 1000)

    def copy(target: Target, offset: int, source: torch.Tensor) -> None:
        made.log.append(f"{source.device} {offset}+{source.numel()}")

    monkeypatch.setattr(cuda, "_copy", copy)
    return made


def load_of(*pieces: tuple[int, torch.Tensor]) -> Load:
    load = Load([], [])
    load.device = [_Source(*piece) for piece in pieces]
    load.end = max((offset + source.numel() for offset, source in pieces), default=0)
    return load


def of(device: torch.device, count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


TARGET = Target(torch.zeros(400, dtype=torch.uint8))


def test_blocks_are_filled_side_by_side_and_each_round_is_told(devices: Devices) -> None:
    stream = cuda.Stream([ONE])
    moving, resting = load_of((0, of(ONE, 10))), load_of((10, of(ONE, 190)))
    stream.start(TARGET, moving, resting, BLOCK)
    assert devices.log == [
        "event cpu.1",
        "cpu after cpu.1",
        "cpu 0+10",
        *("cpu 100+32", "cpu 10+22"),
        *("event cpu.2", "cpu 32+32", "cpu 132+32"),
        *("event cpu.3", "cpu 64+32", "cpu 164+32"),
        *("event cpu.4", "cpu 96+4", "cpu 196+4"),
        "event cpu.5",
    ]
    devices.log.clear()
    told = [(stands, devices.log[-1]) for stands in stream.standing()]
    assert told == [
        (32, "waited for cpu.2"),
        (64, "waited for cpu.3"),
        (96, "waited for cpu.4"),
    ]
    stream.join()
    assert devices.log[-1] == "waited for cpu.5"


def devices_of(cpu: Iterable[int], meta: Iterable[int]) -> list[str]:
    return [*(f"cpu.{n}" for n in cpu), *(f"meta.{n}" for n in meta)]


def test_of_two_devices_it_stands_when_both_have_copied(devices: Devices) -> None:
    stream = cuda.Stream([ONE, TWO])
    resting = load_of((0, of(ONE, 100)), (100, of(TWO, 40)), (140, of(ONE, 60)))
    stream.start(TARGET, load_of(), resting, BLOCK)
    events = [line for line in devices.log if line.startswith("event")]
    cpu, meta = (1, 3, 4, 5, 6), (2, 7, 8)
    assert sorted(events) == sorted(f"event {d}" for d in devices_of(cpu, meta))
    devices.log.clear()
    waited = []
    for stands in stream.standing():
        waited.append((stands, list(devices.log)))
        devices.log.clear()
    assert waited == [
        (32, ["waited for cpu.3", "waited for meta.7"]),
        (64, ["waited for cpu.4", "waited for meta.8"]),  # it has nothing more
        (96, ["waited for cpu.5", "waited for meta.8"]),
    ]


def test_without_devices_nothing_is_told(devices: Devices) -> None:
    stream = cuda.Stream([])
    stream.start(TARGET, load_of(), load_of(), BLOCK)
    assert not list(stream.standing())
    stream.join()
    assert devices.log == []
