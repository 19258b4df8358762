"""The benchmarks run; what they say is not looked at here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from snapshotd.coding.codec import ZfecCodec
from tests.bench import (
    background,
    coding,
    daemon,
    early,
    gpu,
    growth,
    limits,
    memory,
    planes,
    protect,
    recover,
)
from tests.bench.harness import TINY, Scale, report

needs_isal = pytest.mark.skipif(
    type(coding.choose_codec().codec) is ZfecCodec, reason="no ISA-L is here"
)


@pytest.mark.parametrize(
    "bench",
    [
        pytest.param(limits, marks=needs_isal),
        pytest.param(coding, marks=needs_isal),
        background,
        daemon,
        planes,
        protect,
        early,
        recover,
        memory,
        growth,
    ],
    ids=lambda bench: bench.__name__,
)
def test_it_runs(
    bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "NODES", (2,))
    monkeypatch.setattr(protect, "PARITIES", (2,))
    for name, least in (("NODES", (2, 3)), ("SIZES_MIB", (1, 2)), ("TENSORS", (8, 16))):
        monkeypatch.setattr(growth, name, least)
    for name, least in (("SIZES", (1,)), ("MOST_REPEATS", 1)):
        monkeypatch.setattr(recover, name, least)
    monkeypatch.setattr(memory, "NODES", 2)
    monkeypatch.setattr(growth, "LOOK_S", 0.1)
    monkeypatch.setattr(growth, "PLOTS", tmp_path / "growth.png")
    path = tmp_path / "bench.json"
    report(bench.run(TINY), path)
    written = json.loads(path.read_text())
    assert written["machine"]["cores"]
    assert written["tables"]
    assert all(table["rows"] for table in written["tables"])
    assert written["tables"][0]["title"].split()[0] in capsys.readouterr().out


@needs_isal
def test_ratios_are_of_the_same_bytes() -> None:
    """A stripe is whole chunks, and every way of coding it gives the same parity."""
    (stripe,) = [s for s in coding._stripes(Scale(8 << 20, 1)) if s.k == 3]
    codec = coding.choose_codec().codec
    limits.raw_isal(3, 1, 64 << 10, stripe.data, stripe.parity)()
    raw = stripe.parity.tobytes()
    stripe.parity[:] = 0
    coding._encoding(codec, stripe, 256 << 10)()
    assert stripe.parity.tobytes() == raw


def test_what_is_measured_on_a_gpu_runs_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, least in (("STEPS", 2), ("TURNS", 1), ("WARM_UP", 1), ("VOCABULARY", 16)):
        monkeypatch.setattr(gpu, name, least)
    (row,) = gpu.copy(TINY.bytes, TINY.repeats, torch.device("cpu")).rows
    assert row["of_limit"] > 0
    rows = gpu.training(torch.device("cpu"), (1, 64, 64, 16)).rows
    assert [row["snapshot"] for row in rows] == ["never", "each 10 steps", "each 1 steps"]
    assert all(row["step_ms"] > 0 for row in rows)
