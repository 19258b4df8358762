"""The question of a restore: asked once a start, answered when all ranks have asked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Final

from snapshotd.wire.points import point
from snapshotd.wire.protocol import ErrorCode
from snapshotd.wire.v1 import node_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.channel import Channel
from snapshotd_client.errors import (
    CannotProtect,
    NoDaemon,
    ProtectionTimeout,
    Refused,
    SnapshotLost,
    WorldChanged,
)
from snapshotd_client.identity import CLIENT_VERSION, Identity
from snapshotd_client.waiting import Deadline
from snapshotd_client.wires import DaemonGone

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 20.0
#: A daemon that has not answered is asked this often whether it lives, and what it waits for.
LIVENESS_S: Final = 5.0
#: For the daemon to allocate and touch the memory of the first snapshots, some GiB a second.
PREPARED_S: Final = 60.0


def attach_of(
    who: Identity, launch: str, decision: node_pb2.DecisionId | None, passed_step: int
) -> pb.Attach:
    """What a trainer says as it comes: who it is, what it was answered, how far it is."""
    return pb.Attach(
        job=who.job,
        run_id=who.run_id,
        restart_count=who.restart_count,
        shard=who.rank,
        world=who.world_size,
        client_version=CLIENT_VERSION,
        decision=decision,
        passed_step=passed_step,
        launch=launch,
        cpus=sorted(os.sched_getaffinity(0)),
    )


class RestoreQuestion:
    """Asks until there is an answer, also of a daemon that is restarted meanwhile."""

    def __init__(self, channel: Channel, *, required: bool, report: Callable[[str], None]) -> None:
        self._channel = channel
        self._required = required
        self._report = report

    def ask(
        self,
        *,
        allow_fresh: bool,
        deadline: Deadline,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> pb.Restored | None:
        """The daemons' answer; None when none is there, and none is required.

        Args:
            allow_fresh: whether a job that had snapshots may begin anew.
            deadline: for all of it.
            meanwhile: called once the question is out.

        Raises:
            NoDaemon: none answers in time, and one is required.
            ProtectionTimeout: no decision in time; says what it waits for.
            Refused: the daemon does not take the question.
        """
        question = pb.ToDaemon(restore=pb.Restore(allow_fresh=allow_fresh, reshard=True))
        asked = False
        while True:
            try:
                if not self._channel.up:
                    self._channel.connect(deadline.slice_s(CONNECT_TIMEOUT_S))
                number = self._channel.post(question)
                point("trainer.restore.sent")
                if not asked:
                    asked = True
                    meanwhile()
                return self._await(number, deadline)
            except DaemonGone as error:
                self._report(f"the daemon is gone while restoring ({error})")
            except NoDaemon:
                if self._required and deadline.over:
                    raise
                if not self._required:
                    return None

    def _await(self, number: int, deadline: Deadline) -> pb.Restored:
        while True:
            reply = self._channel.wait(number, deadline.slice_s(LIVENESS_S))
            if reply is not None:
                point("trainer.restore.answered")
                return reply.restored
            progress = self._channel.ask(pb.ToDaemon(query=pb.Query()), LIVENESS_S).progress
            if deadline.over:
                raise ProtectionTimeout(
                    f"no decision to restore within {deadline.timeout_s:.0f} s: "
                    f"{progress.why_not or 'the group has not answered'}",
                    "See `snapshotd status` and `snapshotd plan JOB` on this node",
                )


def prepared(channel: Channel) -> list[tuple[str, int]]:
    """The segments that will be granted: paths, and where their images start.

    Waits until the daemon has allocated and touched them. Where it cannot say, there are none.
    """
    if not channel.up:
        return []
    try:
        reply = channel.ask(pb.ToDaemon(prepare=pb.Prepare()), PREPARED_S)
    except (DaemonGone, Refused) as error:
        log.info("no segments are made ready: %s", error)
        return []
    return [(segment.path, segment.image_offset) for segment in reply.prepared.segments]


def refusal_of(decision: node_pb2.Decision) -> Refused:
    """The error for a decision that refuses, with the remedy that fits its kind."""
    match decision.refusal_kind:
        case node_pb2.REFUSAL_KIND_CANNOT_PROTECT:
            return CannotProtect(
                ErrorCode.CANNOT_PROTECT,
                decision.refusal,
                "What the job had saved is kept until then",
            )
        case node_pb2.REFUSAL_KIND_OTHER_WORLD:
            return WorldChanged(
                ErrorCode.OTHER_WORLD,
                decision.refusal,
                "Start it with the number of ranks that saved it, once no others train; or give it "
                "another job name, or "
                'call restore(on_lost="fresh") on all ranks to give the old state up',
            )
        case _:
            return SnapshotLost(
                ErrorCode.LOST,
                decision.refusal,
                "Bring the nodes back that still have it in memory; where none has (after a power "
                "cut, or `snapshotd gc`), begin anew, or from a checkpoint of your own, with "
                'restore(on_lost="fresh") on all ranks',
            )
