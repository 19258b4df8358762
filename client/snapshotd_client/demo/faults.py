"""The scripted faults: what is done, when, and what must be seen afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from snapshotd_client.demo.errors import DemoError
from snapshotd_client.demo.gates import STEPS_WITHOUT_DAEMON, fault_steps
from snapshotd_client.demo.journal import Event, Kind
from snapshotd_client.demo.record import Outcome
from snapshotd_client.demo.run import Run

#: A fault strikes when this step begins, and returns when its consequences are over.
Fault = Callable[[Run, int], Outcome]


def kill_trainer(run: Run, at_step: int) -> Outcome:
    """SIGKILL the trainer of rank 1 in the middle of a step."""
    begun = _wait_for_step(run, at_step, rank=1)
    newest = run.record.newest_step
    fault_s = time.time()
    os.kill(begun.pid, signal.SIGKILL)
    run.note(f"SIGKILL of the trainer of rank 1 on {begun.node}, in step {begun.step}")
    fault = f"trainer killed in step {begun.step}"
    return _resumed(run, fault, "1 trainer", begun.step, fault_s, newest)


def kill_daemon(run: Run, at_step: int) -> Outcome:
    """SIGKILL supervisor and SMPs of a node; training goes on; a new daemon takes over."""
    begun = _wait_for_step(run, at_step, rank=2)
    node = run.cluster.nodes[begun.node]
    newest = run.record.newest_step
    fault_s = time.time()
    killed = len(run.cluster.kill_daemon(node))
    run.note(f"SIGKILL of {node.name}'s supervisor and {killed - 1} SMP, in step {begun.step}")
    first = run.wait(lambda e: _completed(e, newest + 1), "a step without the daemon")
    run.wait(lambda e: _completed(e, newest + STEPS_WITHOUT_DAEMON), "steps without the daemon")
    restart_s, restart_step = time.time(), run.record.newest_step
    run.start_daemons([node])
    run.gates.up_again()
    run.note(f"{node.name}'s daemon serves again, after step {restart_step}")
    safe = run.wait(
        lambda e: e.node == node.name and e.is_protected and e.committed > restart_step,
        f"protection of a step after {restart_step} (let --steps be larger if training ended)",
    )
    _check_protected(run, node.name)
    if restarts := run.record.restarts_since(fault_s):
        raise DemoError(
            f"{restarts} trainers were restarted because a daemon was killed; expected none",
            run.plan.logs,
        )
    run.note(f"protected again at step {safe.committed}; training never stopped")
    return Outcome(
        run=run.plan.name,
        fault=f"daemon killed in step {begun.step}",
        lost=f"supervisor and {killed - 1} SMP",
        step=begun.step,
        time_s=fault_s,
        tier="-",
        recomputed_steps=0,
        first_new_step_s=first.time_s - fault_s,
        decoded_bytes=0,
        copied_bytes=0,
        remark=f"training went on; protected {safe.time_s - restart_s:.1f} s after the restart",
    )


def lose_node(run: Run, at_step: int) -> Outcome:
    """Lose one node; an empty one takes its place."""
    return _lose(run, at_step, count=1)


def lose_nodes(run: Run, at_step: int) -> Outcome:
    """Lose as many nodes at once as the parity allows; empty ones take their places."""
    return _lose(run, at_step, count=run.plan.parity or 1)


FAULTS: Final[Mapping[str, Fault]] = {
    "trainer": kill_trainer,
    "daemon": kill_daemon,
    "node": lose_node,
    "nodes": lose_nodes,
}


def default_faults(parity: int) -> tuple[str, ...]:
    """Names of the faults a run with this parity goes through."""
    return ("trainer", "daemon", "node") if parity == 1 else ("nodes",)


def inject(run: Run, names: Sequence[str]) -> list[Outcome]:
    """Let the faults strike one after the other, spread evenly over the steps."""
    moments = fault_steps(run.plan.steps, len(names))
    outcomes = [FAULTS[name](run, step) for name, step in zip(names, moments, strict=True)]
    run.gates.next()  # the end
    return outcomes


def _lose(run: Run, at_step: int, count: int) -> Outcome:
    # Rank 0 hosts the store of the process group and its node is the coordinator at first, so
    # the loss of that node is the hardest.
    begun = _wait_for_step(run, at_step, rank=0)
    newest = run.record.newest_step
    names = [run.record.node_of(rank) for rank in range(count)]
    fault_s = time.time()
    run.cluster.lose([run.cluster.nodes[name] for name in names])
    lost = " and ".join(names)
    run.note(f"lost {lost} in step {begun.step}: daemon, agent, trainer, memory")
    replacements = [run.cluster.add_replacement() for _ in names]
    run.bring_up(replacements)
    joined = " and ".join(node.name for node in replacements)
    run.note(f"{joined} joined, empty")
    fault = f"{'node' if count == 1 else f'{count} nodes at once'} lost in step {begun.step}"
    return _resumed(run, fault, f"{lost} with all memory", begun.step, fault_s, newest)


def _resumed(
    run: Run, fault: str, lost: str, step: int, fault_s: float, newest_step: int
) -> Outcome:
    """Wait until the job has made new progress after a fault that stopped it."""
    while (recovery := run.record.recovery(fault_s, newest_step)) is None:
        run.wait(lambda e: e.kind in {Kind.READY, Kind.STEP}, f"progress after: {fault}")
    first_new_step_s = recovery.first_new_time_s - fault_s
    recomputed = newest_step - recovery.step
    run.note(
        f"resumed after step {recovery.step} from {recovery.tier} memory, "
        f"{recomputed} steps recomputed, new progress after {first_new_step_s:.1f} s"
    )
    return Outcome(
        run=run.plan.name,
        fault=fault,
        lost=lost,
        step=step,
        time_s=fault_s,
        tier=recovery.tier,
        recomputed_steps=recomputed,
        first_new_step_s=first_new_step_s,
        decoded_bytes=recovery.decoded_bytes,
        copied_bytes=recovery.copied_bytes,
        remark=f"{recovery.moved_ranks} ranks came up on other nodes"
        if recovery.moved_ranks
        else "",
        times=recovery.times,
    )


def _check_protected(run: Run, name: str) -> None:
    """Ask the daemon itself, as an operator would."""
    shards = run.status(run.cluster.nodes[name]).get("shards", [])
    here = [shard for shard in shards if shard.get("home", {}).get("node") == name]
    if not here or not all(shard.get("is_protected") for shard in here):
        raise DemoError(
            f"`snapshotd status` of {name} does not call its shard protected: {here}",
            run.plan.logs,
        )


def _wait_for_step(run: Run, step: int, rank: int) -> Event:
    # Only a step that begins from now on is still being computed when it is reported.
    now_s = time.time()
    run.gates.next()
    return run.wait(
        lambda e: e.kind is Kind.BEGIN and e.rank == rank and e.step >= step and e.time_s >= now_s,
        f"step {step} of rank {rank} (let --steps be larger if training ended)",
    )


def _completed(event: Event, step: int) -> bool:
    return event.kind is Kind.STEP and event.step >= step
