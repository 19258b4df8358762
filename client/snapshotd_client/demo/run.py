"""One run from its first process to its last: start, wait for what should happen, finish."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

# torch exports it without saying so to type checkers.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from snapshotd_client.demo.cluster import WORLD, Cluster, Node, RunPlan
from snapshotd_client.demo.errors import DemoError
from snapshotd_client.demo.gates import Gatekeeper
from snapshotd_client.demo.inbox import Exited, Inbox, Message, Ready
from snapshotd_client.demo.journal import Event, Kind
from snapshotd_client.demo.live import Live
from snapshotd_client.demo.processes import clean_environment
from snapshotd_client.demo.record import Record

DAEMON_TIMEOUT_S: Final = 30.0
#: Longer than any recovery on a slow machine; a run that stands still this long has failed.
EVENT_TIMEOUT_S: Final = 150.0


class Run:
    """A run that is going on; made by `running`."""

    def __init__(self, plan: RunPlan, inbox: Inbox, store: TCPStore, live: Live) -> None:
        self.plan = plan
        self.gates = Gatekeeper(store, plan.name)
        self.cluster = Cluster(plan, inbox)
        self.record = Record(WORLD)
        self._inbox = inbox
        self._live = live

    def start(self) -> None:
        """Start all nodes: the daemons first, as a trainer refuses to begin without one."""
        nodes = self.cluster.add_first_nodes()
        self.bring_up(nodes)

    def bring_up(self, nodes: list[Node]) -> None:
        """Start daemons, and agents once these serve."""
        if self.plan.parity is not None:
            self.start_daemons(nodes)
        for node in nodes:
            self.cluster.start_agent(node)

    def start_daemons(self, nodes: list[Node]) -> None:
        """Start daemons and wait until they serve."""
        for node in nodes:
            self.cluster.start_daemon(node)
        missing = {f"{self.plan.name}-{node.name}" for node in nodes}
        deadline_s = time.monotonic() + DAEMON_TIMEOUT_S
        while missing:
            what = f"daemons {sorted(missing)} to serve"
            message = self._next(what, deadline_s - time.monotonic())
            if isinstance(message, Ready):
                missing.discard(message.name)

    def wait(self, wanted: Callable[[Event], bool], what: str) -> Event:
        """Take events until one is wanted.

        Args:
            wanted: says of each event whether it is the one.
            what: is waited for, for the error.

        Raises:
            DemoError: nothing came for EVENT_TIMEOUT_S, or a program ended.
        """
        while True:
            message = self._next(what, EVENT_TIMEOUT_S)
            if isinstance(message, Event) and wanted(message):
                return message

    def finish(self) -> None:
        """Wait until every rank has written its final state and every agent has ended well."""
        agents_left = len(self.cluster.nodes)
        while agents_left or not self.record.done:
            message = self._receive("the end of training", EVENT_TIMEOUT_S)
            if isinstance(message, Exited):
                if message.code != 0 or "agent" not in message.name:
                    raise self._ended(message, "the end of training")
                agents_left -= 1
        self._live.ended(self.plan.name)

    def status(self, node: Node) -> dict[str, Any]:
        """What `snapshotd status --json` says of a node."""
        command = self.cluster.status_command(node)
        done = subprocess.run(
            command, env=clean_environment(), capture_output=True, timeout=30, check=False
        )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()
            raise DemoError(f"`snapshotd status` of {node.name} failed: {said}", self.plan.logs)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def note(self, text: str) -> None:
        self._live.note(f"{self.plan.name}: {text}")

    def _next(self, what: str, timeout_s: float) -> Message:
        message = self._receive(what, timeout_s)
        if isinstance(message, Exited):
            raise self._ended(message, what)
        return message

    def _receive(self, what: str, timeout_s: float) -> Message:
        message = self._inbox.receive(timeout_s)
        if message is None:
            raise DemoError(f"waited {timeout_s:.0f} s in vain for {what}", self.plan.logs)
        if isinstance(message, Event):
            self.record.take(message)
            if message.kind is Kind.STEP and message.rank == 0:
                self._live.step(self.plan.name, message.step, message.loss)
        return message

    def _ended(self, message: Exited, what: str) -> DemoError:
        ended = f"{message.name} ended with {message.code}"
        return DemoError(f"{ended} while the demo waited for {what}", self.plan.logs)


@contextmanager
def running(plan: RunPlan, inbox: Inbox, store: TCPStore, live: Live) -> Iterator[Run]:
    """Start a run; at the end of the block nothing of it runs and nothing is left in memory."""
    live.run(plan.name, plan.steps)
    run = Run(plan, inbox, store, live)
    try:
        run.start()
        yield run
    except BaseException:
        # What went wrong is the news, not how the daemons took their end.
        run.cluster.stop(quietly=True)
        raise
    run.cluster.stop()
