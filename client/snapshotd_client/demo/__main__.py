"""`snapshotd demo`: train, break, compare every byte.

Exit codes: 0 every byte is equal; 1 something failed; 2 wrong arguments; 130 interrupted.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape

# torch exports it without saying so to type checkers.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from snapshotd_client.demo.cluster import WORLD, RunPlan
from snapshotd_client.demo.errors import DemoError
from snapshotd_client.demo.faults import FAULTS, default_faults, inject
from snapshotd_client.demo.final import compare_final
from snapshotd_client.demo.inbox import Inbox
from snapshotd_client.demo.live import Live
from snapshotd_client.demo.processes import no_orphans
from snapshotd_client.demo.record import Disagreement, loss_curve
from snapshotd_client.demo.report import (
    RunReport,
    draw_curves,
    fault_table,
    times_table,
    write_numbers,
)
from snapshotd_client.demo.run import running

STEPS: Final = 40
STEP_S: Final = 0.3
PLAIN_WIDTH: Final = 140
_MARKER: Final = ".snapshotd-demo"
_REFERENCE: Final = "reference"
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Stage:
    """Where runs take place: directories, messages, the rendezvous store, what is shown."""

    out: Path
    scratch: Path
    shm: Path
    inbox: Inbox
    store: TCPStore
    live: Live

    def plan(
        self, name: str, parity: int | None, steps: int, step_s: float, faults: int = 0
    ) -> RunPlan:
        return RunPlan(
            name=name,
            parity=parity,
            steps=steps,
            step_s=step_s,
            logs=self.out / name,
            scratch=self.scratch / name,
            shm=self.shm / name,
            rendezvous_port=self.store.port,
            faults=faults,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    arguments = _arguments(argv)
    # Into a file or a pipe the table goes in full width; a terminal has its own.
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        _prepare(arguments.out, [_REFERENCE, *map(_name, arguments.parity)])
        with _interruptible(), _stage(arguments.out, arguments.shm, console) as stage:
            _perform(stage, arguments, console)
    except (DemoError, Disagreement, OSError) as error:
        console.print("[bold red]failed:[/bold red]", escape(str(error)), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; everything the demo had started is gone")
        return 130
    return 0


def _perform(stage: Stage, arguments: argparse.Namespace, console: Console) -> None:
    """The scenario: the reference, then each run with faults; then the report."""
    steps, step_s = arguments.steps, arguments.step_s
    began_s = time.monotonic()
    reference = _run(stage, stage.plan(_REFERENCE, None, steps, step_s), ())
    runs, compared = [], {}
    for parity in arguments.parity:
        names = arguments.faults or default_faults(parity)
        plan = stage.plan(_name(parity), parity, steps, step_s, len(names))
        report = _run(stage, plan, names)
        compared[report.name] = _compare(stage, report.name)
        runs.append(report)
    draw_curves(stage.out / "loss.png", reference, runs)
    write_numbers(stage.out / "report.json", [reference, *runs], compared)
    if not arguments.keep:
        _drop_final_states(stage.out)
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    console.print(fault_table(outcomes))
    console.print(times_table(outcomes))
    for name, compared_bytes in compared.items():
        console.print(
            f"[bold green]{name}: all {compared_bytes:,} bytes of the final parameters, "
            "optimizer and RNG states equal the reference's[/bold green]",
            soft_wrap=True,
        )
    took_s = time.monotonic() - began_s
    console.print(f"curves in {stage.out / 'loss.png'}; {took_s:.0f} s in all", soft_wrap=True)


def _run(stage: Stage, plan: RunPlan, faults: Sequence[str]) -> RunReport:
    began_s = time.monotonic()
    with running(plan, stage.inbox, stage.store, stage.live) as run:
        outcomes = inject(run, faults)
        run.finish()
    stage.live.note(f"{plan.name}: trained to the end")
    took_s = time.monotonic() - began_s
    return RunReport(plan.name, loss_curve(run.record.events), outcomes, took_s)


def _compare(stage: Stage, name: str) -> int:
    """Compare a run's final states with the reference's; the bytes compared."""
    compared_bytes = 0
    for rank in range(WORLD):
        file = f"final-rank{rank}.bin"
        result = compare_final(stage.out / _REFERENCE / file, stage.out / name / file)
        if result.difference:
            raise DemoError(
                f"{name} differs from the reference in rank {rank}: {result.difference}",
                stage.out / name,
            )
        compared_bytes += result.compared_bytes
    stage.live.note(f"{name}: every byte equals the reference")
    return compared_bytes


@contextmanager
def _stage(out: Path, shm: Path, console: Console) -> Iterator[Stage]:
    """Set up what all runs share, and take all of it away again."""
    with ExitStack() as stack:
        scratch = _temporary(stack, None)
        memory = _temporary(stack, shm)
        stack.enter_context(no_orphans())
        inbox = stack.enter_context(Inbox(scratch))
        # The rendezvous store lives here, so that no node is needed for it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        live = stack.enter_context(Live(console))
        # Once cleaning up has begun, nothing interrupts it.
        stack.callback(_ignore_signals)
        yield Stage(out, scratch, memory, inbox, store, live)


def _temporary(stack: ExitStack, parent: Path | None) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory("", "snapshotd-demo-", parent)))


def _prepare(out: Path, names: Sequence[str]) -> None:
    """Make the output directory; what an earlier demo left in it goes, nothing else."""
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise DemoError(f"{out} is not empty and not a demo's; give another directory with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)


def _drop_final_states(out: Path) -> None:
    for path in out.glob("*/final-rank*"):
        path.unlink()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Clean up when told to end, as when interrupted; nohup is respected."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _name(parity: int) -> str:
    return f"m{parity}"


def _parity(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not all(1 <= value < WORLD for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected different numbers of 1 to {WORLD - 1}: {text}")
    return values


def _faults(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in FAULTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(FAULTS)}: {unknown}")
    return names


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="snapshotd demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="logs and results")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--step-s", type=float, default=STEP_S, help="shortest time of a step")
    parser.add_argument("--parity", type=_parity, default=[1, 2], help="one run for each: 1,2")
    parser.add_argument("--faults", type=_faults, help=f"instead of the usual: {','.join(FAULTS)}")
    parser.add_argument("--shm", type=Path, default=Path("/dev/shm"), help="a tmpfs")  # noqa: S108
    parser.add_argument("--keep", action="store_true", help="keep the final states, 39 MB a run")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    return arguments


if __name__ == "__main__":
    sys.exit(main())
