"""The trainer's desk: its requests to the machine, the machine's answers to it.

A request is checked, becomes one event, and is answered at once or when the machine says so.
The desk holds the open question of each kind, at most one, as a trainer asks one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from typing import TYPE_CHECKING

from snapshotd.core.economy import given_up
from snapshotd.core.instructions import Answer, Deny
from snapshotd.errors import RequestError, SnapshotdError
from snapshotd.flow.filling import Filling
from snapshotd.metadata import SlotCounters, TrainerFacts
from snapshotd.rpc.checks import check_cpus, check_job, check_name, check_rank, check_step
from snapshotd.rpc.convert import decision_id_from, decision_to, ranges_from, version_to
from snapshotd.rpc.trainers import TrainerSocket, refused
from snapshotd.wire.points import point
from snapshotd.wire.protocol import HEADER_BYTES, ErrorCode
from snapshotd.wire.v1 import node_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd.wire.v1.segment_pb2 import SealRecord

if TYPE_CHECKING:
    from snapshotd.flow.smp import Smp

#: Refuses an attach that cannot be served: (predicted image bytes) -> None, raises NoRoom.
Preflight = Callable[[int], None]


class TrainerDesk:
    """Serves the one trainer of a slot."""

    def __init__(
        self,
        smp: Smp,
        socket: TrainerSocket,
        cluster_id: str,
        preflight: Preflight,
        lock_holder: Callable[[], str | None],
        stand_back: Callable[[Set[int]], None],
    ) -> None:
        self._smp = smp
        self._machine = smp.machine
        self._socket = socket
        self._cluster_id = cluster_id
        self._preflight = preflight
        self._lock_holder = lock_holder
        self._stand_back = stand_back
        self._identity = b""
        self._open: dict[str, int] = {}  # kind of question -> its request number
        self._reported: pb.Progress | None = None

    async def handle(self, identity: bytes, message: pb.ToDaemon) -> pb.ToTrainer | None:
        """One request. Raises SnapshotdError for a refusal."""
        body = message.WhichOneof("body")
        if body == "attach":
            return pb.ToTrainer(attached=self._attach(identity, message))
        self._check_owner(message)
        match body:
            case "restore":
                asked = message.restore
                self._machine.ask_restore(allow_fresh=asked.allow_fresh, reshard=asked.reshard)
                point("smp.restore.heard")
                assert self._machine.trainer is not None, "it has just asked"
                self._smp.foresight.begin(self._machine.trainer.job, self._machine.trainer.shard)
                self._open["restore"] = message.request
            case "claim":
                self._claim(message)
            case "copied":
                self._copied(message.copied)
                return None
            case "written":
                self._written(message.written)
                return self._accepted()
            case "prepare":
                self._open["prepare"] = message.request
                self._smp.start(self._prepared())
            case "pass":
                self._passed(getattr(message, "pass").step)
                return self._accepted()
            case "manifests" | "fill":
                self._open[body] = message.request
                self._smp.start(self._lend(body, message))
            case "query":
                return pb.ToTrainer(progress=self._progress())
            case "detach":
                point("smp.detach.heard")
                self._smp.forget_trainer()
                return self._accepted()
            case _:
                raise RequestError(ErrorCode.MALFORMED, f"{body} is not for this socket")
        self._smp.wake()
        return None

    def _accepted(self) -> pb.ToTrainer:
        self._smp.wake()
        return pb.ToTrainer(accepted=pb.Accepted())

    def _check_owner(self, message: pb.ToDaemon) -> None:
        trainer = self._machine.trainer
        if trainer is None or trainer.incarnation != message.incarnation:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER, "this trainer is not attached to this slot", "Attach first"
            )

    def _attach(self, identity: bytes, message: pb.ToDaemon) -> pb.Attached:
        facts = trainer_facts(message)
        cpus = frozenset(message.attach.cpus)
        check_cpus(cpus)
        self._check_lock(facts.incarnation)
        if message.attach.predicted_image_bytes:
            self._preflight(message.attach.predicted_image_bytes)
        self._smp.give_back()
        self._machine.attach(facts)
        self._smp.shortage.check(facts.job, message.attach.predicted_image_bytes)
        self._stand_back(cpus)
        self._smp.start(self._smp.readiness.make(facts.job, message.attach.predicted_image_bytes))
        point("smp.attach.taken")
        self._identity = identity
        self._open.clear()
        self._reported = None
        self._smp.wake()
        return pb.Attached(
            cluster_id=self._cluster_id,
            node=self._machine.home.node,
            newest=self._newest(facts.job, facts.shard),
        )

    def _newest(self, job: str, shard: int) -> pb.Image | None:
        """What a restore may well name: the trainer can map it meanwhile."""
        holding = self._smp.foresight.newest(job, shard)
        if holding is None:
            return None
        try:
            segment = self._smp.vault.segment(job, holding.version, shard)
            record = segment.record
        except SnapshotdError:
            return None  # just let go of, or damaged: who restores it will say so
        assert isinstance(record, SealRecord), "what a shard's segment has"
        return pb.Image(
            path=str(segment.path),
            image_offset=HEADER_BYTES,
            image_bytes=record.image_bytes,
            manifest_bytes=record.manifest_bytes,
        )

    def _check_lock(self, incarnation: str) -> None:
        """A slot is its who holds the slot's lock, and has said in it who he is."""
        holder = self._lock_holder()
        if holder is None:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                "the trainer does not hold its lock in the run directory",
                "Attach with snapshotd_client of this version",
            )
        if holder != incarnation:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                f"the lock of slot {self._machine.home.slot} is held by another trainer",
                "Give each trainer of the node its own LOCAL_RANK, and use snapshotd_client of "
                "this version",
            )

    def _claim(self, message: pb.ToDaemon) -> None:
        claim = message.claim
        check_step(claim.step)
        until_s = time.monotonic() + max(0.0, claim.patience_s)
        self._machine.claim(claim.step, claim.image_bytes, until_s)
        point("smp.claim.heard")
        if self._smp.lending is not None:
            self._smp.lending.give_back()
        self._open["claim"] = message.request

    def _copied(self, copied: pb.Copied) -> None:
        filling = self._granted_buffer(copied)
        if copied.block_bytes > filling.block_bytes:
            raise RequestError(
                ErrorCode.MALFORMED,
                f"{copied.block_bytes} bytes of each block of {filling.block_bytes}",
            )
        self._smp.buffer.stands(filling, copied.block_bytes)

    def _granted_buffer(self, said: pb.Copied | pb.Written) -> Filling:
        """The buffer that it speaks of. Raises RequestError: it is not the trainer's to write."""
        filling = self._smp.buffer.filling
        if (
            filling is None
            or filling.segment.name != said.buffer
            or filling.version.step != said.step
        ):
            raise RequestError(
                ErrorCode.OUT_OF_ORDER, f"buffer {said.buffer!r} was not granted for this step"
            )
        return filling

    def _written(self, written: pb.Written) -> None:
        filling = self._granted_buffer(written)
        if written.image_bytes > filling.image_bytes:
            raise RequestError(
                ErrorCode.MALFORMED,
                f"{written.image_bytes} bytes in a buffer that was claimed for "
                f"{filling.image_bytes}",
            )
        if written.manifest_bytes > written.image_bytes:
            raise RequestError(
                ErrorCode.MALFORMED,
                f"a manifest of {written.manifest_bytes} bytes in an image of "
                f"{written.image_bytes}",
            )
        trained = ranges_from(written.trained, written.image_bytes)
        self._smp.buffer.seal(written.image_bytes, written.manifest_bytes, trained)

    def _passed(self, step: int) -> None:
        check_step(step)
        self._machine.passed(step)
        filling = self._smp.buffer.filling
        if filling is None or filling.version.step == step:
            self._smp.give_back()

    # -- answers

    async def granted(self, filling: Filling) -> None:
        """A buffer for the open claim."""
        segment = filling.segment
        reply = pb.Granted(
            path=str(segment.path),
            image_offset=HEADER_BYTES,
            image_capacity=segment.image_capacity,
            buffer=segment.name,
            block_bytes=filling.block_bytes,
        )
        await self._reply("claim", pb.ToTrainer(granted=reply))

    async def _prepared(self) -> None:
        """The memory that was made for the trainer when it attached."""
        segments = [
            pb.Prepared.Segment(path=str(segment.path), image_offset=HEADER_BYTES)
            for segment in await self._smp.readiness.segments()
        ]
        await self._reply("prepare", pb.ToTrainer(prepared=pb.Prepared(segments=segments)))

    async def _lend(self, question: str, message: pb.ToDaemon) -> None:
        """Bytes of the restored version, gathered."""
        assert self._smp.lending is not None, "made before the socket is bound"
        reply = await self._smp.lending.answer(message)
        if self._open.get(question) == message.request:
            await self._reply(question, reply)

    async def deliver(self, answer: Answer | Deny) -> None:
        """What the machine decided about an open question."""
        if isinstance(answer, Deny):
            point("smp.claim.denied")
            await self._reply("claim", pb.ToTrainer(skip=pb.Skip(reason=answer.reason)))
        else:
            point("smp.answer.begun")
            await self._reply("restore", self._restored(answer))
            point("smp.answer.sent")

    def _restored(self, answer: Answer) -> pb.ToTrainer:
        decision, trainer = answer.decision, self._machine.trainer
        reply = pb.Restored(decision=decision_to(decision))
        if decision.restore is not None and not decision.saved_world and trainer is not None:
            try:
                segment, record = self._smp.record_of(decision, trainer.shard)
            except SnapshotdError as error:
                return pb.ToTrainer(refused=refused(error))
            reply.path = str(segment.path)
            reply.image_offset = HEADER_BYTES
            reply.image_bytes = record.image_bytes
            reply.manifest_bytes = record.manifest_bytes
            counters = self._smp.vault.counters()
            reply.bytes_copied = counters.bytes_copied
            reply.bytes_decoded = counters.bytes_decoded
            reply.staged_s = self._smp.staged_s
        return pb.ToTrainer(restored=reply)

    async def _reply(self, question: str, message: pb.ToTrainer) -> None:
        message.request = self._open.pop(question, 0)
        if message.request:
            await self._socket.send(self._identity, message)

    async def report(self) -> None:
        """Tell the trainer how far its state is protected, when that has changed."""
        trainer = self._machine.trainer
        if trainer is None or trainer.waiting:
            return
        progress = self._progress()
        if progress != self._reported:
            self._reported = progress
            await self._socket.send(self._identity, pb.ToTrainer(progress=progress))

    def _progress(self) -> pb.Progress:
        trainer = self._machine.trainer
        progress = pb.Progress(
            skipped=trainer.skipped if trainer else 0,
            repeated_now=self._smp.vault.repeats.in_a_row,
        )
        job = self._machine.orders.job(trainer.job) if trainer else None
        if trainer is None or job is None:
            waits = self._machine.orders.waits.get(trainer.job, "") if trainer else ""
            progress.why_not = waits or "the node does not know the job yet"
            return progress
        saving = given_up(job.economy)
        progress.why_not = self._machine.orders.waits.get(trainer.job, saving)
        progress.is_protected = 0 < job.lineage == job.committed_in and not saving
        progress.cadence.CopyFrom(
            node_pb2.Cadence(interval=job.cadence.interval, from_step=job.cadence.from_step)
        )
        if job.committed is not None:
            progress.committed.CopyFrom(version_to(job.committed))
        facts = self._machine.facts("", SlotCounters())
        mine = [d for d in facts.data if (d.job, d.shard) == (trainer.job, trainer.shard)]
        progress.sealed.extend(version_to(d.version) for d in mine)
        progress.passed_step = facts.trainer.passed_step if facts.trainer else 0
        missing = self._machine.why_not_protected(job)
        progress.waits_for.extend(f"{home} {why}" for home, why in missing)
        return progress


def trainer_facts(message: pb.ToDaemon) -> TrainerFacts:
    """What an Attach says of its trainer. Raises RequestError when it makes no sense."""
    attach = message.attach
    check_job(attach.job)
    check_rank(attach.shard, attach.world)
    check_name("an incarnation", message.incarnation)
    check_name("a run id", attach.run_id)
    check_name("a launch", attach.launch, 0)
    check_step(attach.passed_step)
    return TrainerFacts(
        job=attach.job,
        run_id=attach.run_id,
        restart_count=attach.restart_count,
        incarnation=message.incarnation,
        shard=attach.shard,
        world=attach.world,
        decision=decision_id_from(attach.decision) if attach.HasField("decision") else None,
        passed_step=attach.passed_step,
        launch=attach.launch,
    )
