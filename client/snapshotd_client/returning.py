"""A restore from the question to the state: asked again where the daemon dies on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from snapshotd.wire.v1 import node_pb2
from snapshotd_client.asking import RestoreQuestion, refusal_of
from snapshotd_client.buffers import Reading
from snapshotd_client.channel import Channel
from snapshotd_client.errors import NoDaemon
from snapshotd_client.foreseen import Foreseen
from snapshotd_client.identity import Identity
from snapshotd_client.lock import TrainerLock
from snapshotd_client.restoring import WayBack
from snapshotd_client.results import Restored
from snapshotd_client.waiting import Deadline
from snapshotd_client.wires import DaemonGone


class Return(NamedTuple):
    """What came of it.

    Attributes:
        decision: of the daemons.
        restored: None where there was nothing to restore.
    """

    decision: node_pb2.DecisionId
    restored: Restored | None


class Returning:
    """Brings one trainer's state back.

    Args:
        channel: to the daemon.
        lock: of the slot; acquired if it is not held.
        who: this trainer.
        states: as given to Snapshotter.
        required: whether it is an error when no daemon is there.
        report: told of troubles.
        spent: closes a mapping when nobody waits for it.
    """

    def __init__(
        self,
        channel: Channel,
        lock: TrainerLock,
        who: Identity,
        states: Mapping[str, object],
        *,
        required: bool,
        report: Callable[[str], None],
        spent: Callable[[Reading], None],
    ) -> None:
        self._spent = spent
        self._channel = channel
        self._lock = lock
        self._who = who
        self._states = states
        self._required = required
        self._report = report

    def come_back(self, *, allow_fresh: bool, strict: bool, timeout_s: float) -> Return | None:
        """Ask, and restore; None where no daemon is there and none is required.

        Raises:
            as `Snapshotter.restore` says.
        """
        deadline = Deadline(timeout_s)
        if not self._locked():
            return None
        question = RestoreQuestion(self._channel, required=self._required, report=self._report)
        while True:
            seen = Foreseen()
            try:
                return self._ask_and_take(question, seen, allow_fresh, strict, deadline)
            except DaemonGone as error:
                self._report(f"the daemon is gone while restoring ({error})")
            finally:
                seen.let_go(self._spent)

    def _ask_and_take(
        self,
        question: RestoreQuestion,
        seen: Foreseen,
        allow_fresh: bool,
        strict: bool,
        deadline: Deadline,
    ) -> Return | None:
        asked_s = time.monotonic()
        reply = question.ask(
            allow_fresh=allow_fresh,
            deadline=deadline,
            meanwhile=lambda: seen.look(self._channel.newest, self._states),
        )
        answered_s = time.monotonic()
        if reply is None:
            return None
        seen.end(reply.path, reply.image_offset, reply.image_bytes)
        decision = reply.decision
        if decision.WhichOneof("outcome") == "refusal":
            raise refusal_of(decision)
        if not decision.HasField("restore"):
            return Return(decision.id, None)
        way = WayBack(
            self._who,
            self._states,
            lambda message: self._channel.ask(message, deadline.left_s()),
            strict=strict,
            deadline=deadline,
            spent=self._spent,
            seen=seen,
        )
        restored = way.take(reply)
        return Return(
            decision.id,
            replace(
                restored,
                waited_s=answered_s - asked_s,
                staged_s=reply.staged_s,
                loaded_s=time.monotonic() - answered_s,
            ),
        )

    def _locked(self) -> bool:
        """Hold the slot's lock: at construction there may have been no directory for it."""
        try:
            if not self._lock.held:
                self._lock.acquire()
        except NoDaemon:
            if self._required:
                raise
            return False
        return True
