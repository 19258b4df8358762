"""What the demo leaves: a table with every fact, a picture, a file of numbers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from snapshotd_client.demo.record import Outcome, Times
from snapshotd_client.demo.report import (
    RunReport,
    draw_curves,
    fault_table,
    times_table,
    write_numbers,
)

OUTCOME = Outcome(
    run="m2",
    fault="2 nodes at once lost in step 17",
    lost="n0 and n1 with all memory",
    step=17,
    time_s=1003.0,
    tier="group",
    recomputed_steps=3,
    first_new_step_s=12.34,
    decoded_bytes=9_771_277,
    copied_bytes=55,
    remark="4 ranks came up on other nodes",
    times=Times(2.11, 3.22, 0.33, 0.44, 0.55, 5.69),
)
CURVE = [(1000.0 + step, step, 5.0 - step) for step in range(4)]


def test_table_has_every_fact() -> None:
    shown = io.StringIO()
    Console(width=240, file=shown).print(fault_table([OUTCOME]))
    text = shown.getvalue()
    facts = (OUTCOME.run, OUTCOME.fault, OUTCOME.lost, OUTCOME.remark, "12.3 s", "9,771,277", "55")
    assert all(fact in text for fact in facts)
    assert " 3 " in text


def test_times_are_of_the_faults_that_stopped_the_job() -> None:
    shown = io.StringIO()
    went_on = replace(OUTCOME, fault="daemon killed in step 9", times=None)
    Console(width=240, file=shown).print(times_table([OUTCOME, went_on]))
    text = shown.getvalue()
    assert all(part in text for part in ("2.11", "3.22", "0.33", "0.44", "0.55", "5.69", "12.34"))
    assert OUTCOME.fault in text
    assert went_on.fault not in text


def test_picture_is_drawn(tmp_path: Path) -> None:
    reference = RunReport("reference", CURVE, [], 4.0)
    draw_curves(tmp_path / "loss.png", reference, [RunReport("m2", CURVE, [OUTCOME], 9.0)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_can_be_read_back(tmp_path: Path) -> None:
    write_numbers(tmp_path / "report.json", [RunReport("m2", CURVE, [OUTCOME], 9.0)], {"m2": 10})
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["bytes_equal_to_reference"] == {"m2": 10}
    assert content["runs"][0]["outcomes"][0]["decoded_bytes"] == 9_771_277
