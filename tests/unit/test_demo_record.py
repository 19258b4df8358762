"""What the demo concludes from events: restarts, recovery, curves, and when faults strike."""

from __future__ import annotations

import threading
from dataclasses import astuple

import pytest
from torch.distributed import TCPStore

from snapshotd_client.demo.faults import FAULTS, default_faults
from snapshotd_client.demo.gates import Gatekeeper, Gates, fault_steps, gates
from snapshotd_client.demo.journal import Event, Kind
from snapshotd_client.demo.record import Disagreement, Record, Times, loss_curve


def _event(kind: Kind, rank: int, time_s: float, **facts) -> Event:
    node = facts.pop("node", f"n{rank}")
    return Event(kind, rank, node, 100 + rank, time_s, **facts)


def _record(*events: Event, world: int = 2) -> Record:
    record = Record(world)
    for event in events:
        record.take(event)
    return record


BEFORE = [
    *(_event(Kind.UP, rank, 1.0) for rank in (0, 1)),
    *(_event(Kind.STEP, rank, 2.0 + step, step=step) for step in range(4) for rank in (0, 1)),
]
FAULT_S = 6.0


def _ready(rank: int, time_s: float, step: int = 2, tier: str = "group", **facts) -> Event:
    return _event(Kind.READY, rank, time_s, step=step, tier=tier, **facts)


def test_newest_step_and_place_of_a_rank() -> None:
    record = _record(*BEFORE, _event(Kind.UP, 1, 7.0, node="n5"))
    assert record.newest_step == 3
    assert (record.node_of(0), record.node_of(1)) == ("n0", "n5")
    assert record.restarts_since(FAULT_S) == 1
    assert Record(2).newest_step == -1


def test_recovery_needs_all_ranks_and_new_progress() -> None:
    events = [
        _ready(0, 8.0, decoded_bytes=10, node="n9"),
        _ready(1, 8.1, copied_bytes=5),
        _event(Kind.STEP, 0, 9.0, step=3),  # was complete before the fault: not new
        _event(Kind.STEP, 0, 10.0, step=4),
    ]
    for cut in range(len(events)):
        assert _record(*BEFORE, *events[:cut]).recovery(FAULT_S, 3) is None
    recovery = _record(*BEFORE, *events).recovery(FAULT_S, 3)
    assert recovery is not None
    assert (recovery.step, recovery.tier) == (2, "group")
    assert (recovery.decoded_bytes, recovery.copied_bytes) == (10, 5)
    assert recovery.moved_ranks == 1
    assert recovery.first_new_time_s == 10.0


def test_times_add_up_to_the_whole() -> None:
    record = _record(
        *BEFORE,
        _event(Kind.UP, 0, 7.0),  # of a start that came to nothing
        *(Event(Kind.UP, rank, "n0", 200 + rank, 8.0 + rank) for rank in (0, 1)),
        Event(
            Kind.READY, 0, "n0", 200, 15.0, 2, tier="group", waited_s=4.0, staged_s=0.5,
            loaded_s=1.0,
        ),
        Event(
            Kind.READY, 1, "n0", 201, 15.5, 2, tier="group", waited_s=3.0, staged_s=2.0,
            loaded_s=1.5,
        ),
        _event(Kind.STEP, 0, 18.0, step=4),
    )  # fmt: skip
    recovery = record.recovery(FAULT_S, 3)
    assert recovery is not None
    assert recovery.times == Times(
        detection=3.0, rendezvous=2.0, plan=1.0, rebuild=2.0, load=1.5, steps=2.5
    )
    assert sum(astuple(recovery.times)) == recovery.first_new_time_s - FAULT_S


def test_a_step_that_ends_after_the_fault_without_a_restart_is_no_recovery() -> None:
    late = _event(Kind.STEP, 1, 6.1, step=4)
    assert _record(*BEFORE, late).recovery(FAULT_S, 3) is None
    events = [late, _ready(0, 8.0), _ready(1, 8.0), _event(Kind.STEP, 0, 9.0, step=4)]
    recovery = _record(*BEFORE, *events).recovery(FAULT_S, 3)
    assert recovery is not None
    assert recovery.first_new_time_s == 9.0


def test_a_second_restart_counts() -> None:
    events = [
        *(_ready(rank, 8.0, step=1) for rank in (0, 1)),
        *(_ready(rank, 9.0, step=2) for rank in (0, 1)),
        _event(Kind.STEP, 0, 10.0, step=4),
    ]
    recovery = _record(*BEFORE, *events).recovery(FAULT_S, 3)
    assert recovery is not None
    assert recovery.step == 2


@pytest.mark.parametrize("other", [{"step": 1}, {"tier": "local"}])
def test_ranks_that_disagree_are_an_error(other: dict) -> None:
    events = [_ready(0, 8.0), _ready(1, 8.0, **other), _event(Kind.STEP, 0, 9.0, step=4)]
    with pytest.raises(Disagreement, match="different"):
        _record(*BEFORE, *events).recovery(FAULT_S, 3)


def test_done_when_every_rank_is() -> None:
    assert not _record(_event(Kind.DONE, 0, 1.0), _event(Kind.DONE, 0, 1.0)).done
    assert _record(_event(Kind.DONE, 0, 1.0), _event(Kind.DONE, 1, 1.0)).done


def test_curve_keeps_recomputed_steps_in_order() -> None:
    steps = [(0, 3.0), (1, 2.0), (1, 2.0)]
    events = [_event(Kind.STEP, 0, float(i), step=s, loss=x) for i, (s, x) in enumerate(steps)]
    events.append(_event(Kind.STEP, 1, 9.0, step=1, loss=2.0))
    assert loss_curve(events) == [(0.0, 0, 3.0), (1.0, 1, 2.0), (2.0, 1, 2.0)]


def test_events_survive_the_journal() -> None:
    event = _ready(1, 2.5, decoded_bytes=7)
    assert Event.from_line(event.to_line().replace("NaN", "0.5")).decoded_bytes == 7
    with pytest.raises(ValueError, match="surprise"):
        Event.from_line('{"kind": "surprise"}')


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_faults_strike_in_order_and_leave_room(count: int) -> None:
    moments = fault_steps(40, count)
    assert len(set(moments)) == count
    assert moments == sorted(moments)
    assert moments[0] >= 40 // (2 * count + 1)
    assert 40 - moments[-1] >= 8


def test_training_waits_for_each_fault_and_at_its_end_for_all() -> None:
    assert gates(40, 0) == {}
    assert gates(40, 3) == {
        5: ["due/0"], 11: ["half/0"], 17: ["due/1"], 22: ["half/1"], 28: ["due/2"],
        34: ["half/2"], 40: ["due/3"],
    }  # fmt: skip
    for steps in range(12, 60):
        found = gates(steps, 3)
        assert [n for s in sorted(found) for n in found[s] if n.startswith("due")] == [
            f"due/{number}" for number in range(4)
        ]


def test_a_gate_holds_training_until_the_fault_is_over() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    keeper, trainer = Gatekeeper(store, "m1"), Gates(store.port, "m1", 40, 3)
    other = Gatekeeper(store, "m2")
    settled, passed = threading.Event(), []

    def training() -> None:
        for step in range(41):
            trainer.wait(step, settled.set)
            passed.append(step)

    keeper.next()
    thread = threading.Thread(target=training)
    thread.start()
    for _ in range(4):
        other.next()
    # It is held by what the first fault took down, which needs nothing settled.
    keeper.up_again()
    settled.wait()
    settled.clear()
    assert passed == list(range(17))
    for _ in range(3):
        keeper.next()
    thread.join()
    assert passed == list(range(41))


@pytest.mark.parametrize("parity", [1, 2, 3])
def test_default_faults_exist(parity: int) -> None:
    assert set(default_faults(parity)) <= set(FAULTS)
