"""The persistent tier under faults: the real minds and the real store, over files that fail.

Homes persist together while everything dies at any operation of the store; now and then all memory
is lost, and another number of ranks may take up what is there. The laws: a step that counts is
whole; there is always one, once there was one; a restore takes the newest good one for all ranks.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.core.persist import (
    RETRY_LAST_S,
    Look,
    Persistence,
    Publish,
    Schedule,
    Stop,
    Write,
    leftovers,
    removable,
)
from snapshotd.core.restore import Situation, Wait, decide, within_lineage
from snapshotd.core.tier import TierView, learned
from snapshotd.errors import DamagedBytes, SnapshotdError
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    RefusalKind,
    SlotFacts,
    Tier,
    TrainerFacts,
    Version,
)
from snapshotd.tier.store import Store
from snapshotd.wire.v1.segment_pb2 import SealRecord
from snapshotd.wire.v1.segment_pb2 import Version as VersionMessage

from .files import Died, Files, flip
from .violation import Violation, must

JOB = "job"
HOMES = [Home(n, 0) for n in "abcd"]
SCHEDULE = Schedule(0.0, 3, 2, 4)
IMAGE_BYTES = 9_000  # three grains
PATIENCE_S = 10.0
#: Two files rot at most, each of another step.
MOST_DECISIONS = 3


def image_of(shard: int, version: Version) -> bytes:
    return random.Random(f"{shard} {version}").randbytes(IMAGE_BYTES + 100 * shard)


def record_of(shard: int, version: Version, world: int) -> SealRecord:
    image = memoryview(image_of(shard, version))
    digests = grain_digests(image)
    return SealRecord(
        job=JOB,
        world=world,
        shard=shard,
        version=VersionMessage(epoch=version.epoch, step=version.step),
        image_bytes=len(image),
        manifest_bytes=10,
        grain_digests=digests,
        content_digest=content_digest(digests),
    )


class World:
    """Homes of one job, and what they hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        Files.store.clear()
        Files.uses.clear()
        Files.injected.clear()
        Files.seed, Files.chance = seed, 0.0
        self.store = Store(f"simulated://tier-{seed}", JOB)
        self.now_s = 0.0
        self.step = 0
        self.minds = {h: Persistence(h, SCHEDULE) for h in HOMES}
        self.heard: dict[Home, SlotFacts] = {}
        self.held: dict[Home, list[tuple[int, Version, int]]] = {h: [] for h in HOMES}
        self.tasks: list[tuple[Home, Any]] = []
        self.was_whole = False
        self.counts: Counter[str] = Counter()
        members = tuple(Member(s, h) for s, h in enumerate(HOMES[:3]))
        decision = Decision(DecisionId(1, "a"), JOB, 3, (Group(members, 1),), ("x", "y", "z"))
        self.job = JobFacts(JOB, 3, 1, 1, None, 0, decision)

    @property
    def members(self) -> tuple[Member, ...]:
        assert self.job.decision is not None
        return self.job.decision.groups[0].members

    @contextmanager
    def faults(self, chance: float) -> Iterator[None]:
        Files.chance = chance
        try:
            yield
        finally:
            Files.chance = 0.0

    # -- training

    def commit(self) -> None:
        self.step += 1
        point = Version(self.job.lineage, self.step)
        for member in self.members:
            new = (member.shard, point, self.job.world)
            self.held[member.home] = [*self.held[member.home][-1:], new]
        self.job = replace(self.job, committed=point, committed_in=self.job.lineage)

    def facts(self, home: Home) -> SlotFacts:
        data = tuple(DataHolding(JOB, s, v, 9, b"d", w) for s, v, w in self.held[home])
        return SlotFacts(0, "up", data=data, persist=self.minds[home].facts())

    def conclude(self, home: Home) -> None:
        slots = {**self.heard, home: self.facts(home)}
        for told in self.minds[home].instructions([self.job], slots, self.now_s, self.now_s):
            if isinstance(told, Stop):
                for task in [t for t in self.tasks if t[0] == home and isinstance(t[1], Write)]:
                    self.tasks.remove(task)
                    self.minds[home].stopped(task[1])
            else:
                self.tasks.append((home, told))

    # -- errands

    def finish(self, chance: float) -> None:
        """Some errand comes to its end, of one kind or another."""
        if not self.tasks:
            return
        home, task = self.tasks.pop(self.random.randrange(len(self.tasks)))
        mind = self.minds[home]
        try:
            with self.faults(chance):
                self._do(home, task)
        except (SnapshotdError, Died) as error:
            if isinstance(error, Died) and self.random.random() < 0.5:
                self.restart(home)  # its SMP dies with it
            elif isinstance(task, Write):
                mind.hindered(task, "it failed")
                self.tasks.append((home, task))
            else:
                mind.failed(JOB, "it failed", self.now_s)
        self.check()

    def _do(self, home: Home, task: Any) -> None:
        """As `flow.persist` and `tier.program` do it. Raises SnapshotdError, Died."""
        mind = self.minds[home]
        match task:
            case Look(job):
                mind.looked(job, self.store.look())
            case Write(_, shard, version):
                world = next((w for s, v, w in self.held[home] if (s, v) == (shard, version)), 0)
                if not world:
                    mind.gone(task, "freed")
                    return
                image = memoryview(image_of(shard, version))
                self.store.write(image, record_of(shard, version, world))
                mind.wrote(task)
            case Publish(job, version, world, number):
                self.store.publish(version, world, number)
                self.counts["published"] += 1
                stored = self.store.look()
                old = [*removable(stored.steps, SCHEDULE), *leftovers(stored, version)]
                self.store.remove(v for v in old if v != version)
                mind.published(job, version, self.store.look())

    def restart(self, home: Home) -> None:
        """Its SMP dies with what it knew; its bytes stay."""
        self.minds[home] = Persistence(home, SCHEDULE)
        self.tasks = [t for t in self.tasks if t[0] != home]

    # -- the laws of what is there

    def check(self) -> None:
        """Of what is there now, whatever was killed on the way."""
        steps = self.store.look().steps
        for step in steps:
            must(self._whole(step.version, step.world), "a step that counts is whole", str(step))
        self.was_whole = self.was_whole or bool(steps)
        must(bool(steps) == self.was_whole, "the only good step is not deleted", "none is left")

    def _whole(self, version: Version, world: int) -> bool:
        try:
            return all(
                b"".join(self.store.read(version, record)) == image_of(record.shard, version)
                for record in self.store.indexed_seals(version, range(world))
            )
        except DamagedBytes:
            return False

    # -- all memory is lost

    def lose_all(self) -> None:
        """Another number of ranks comes back, with a file or two that rotted meanwhile."""
        self.tasks.clear()
        self.heard.clear()
        self.held = {h: [] for h in HOMES}
        self.minds = {h: Persistence(h, SCHEDULE) for h in HOMES}
        files = [p for p in Files.store if p.endswith(".image")]
        rotten = self.random.sample(files, min(len(files), self.random.choice([0, 0, 1, 1, 2])))
        for path in rotten:
            flip(path)
        self._come_back(self.random.choice([2, 3, 4]), able=self.random.random() < 0.8)
        for path in rotten:
            flip(path)

    def _come_back(self, world: int, *, able: bool) -> None:
        homes = self.random.sample(HOMES, world)
        stored = self.store.look()
        # Where nobody remembers the job, nobody remembers what it gave up.
        known = self.job if self.random.random() < 0.5 else None
        good = [
            s.version
            for s in stored.steps
            if (able or s.world == world)
            and within_lineage(s.version, known)
            and self._whole(s.version, s.world)
        ]
        best = max(good, default=None)
        decision = self._decided(TierView(self.store.url, stored), known, homes, able=able)
        if decision.refusal:
            # It does not go further back behind the back of those who cannot take the newest.
            theirs = not able and decision.refusal_kind is RefusalKind.OTHER_WORLD
            must(theirs or best is None, "a good step is not refused", decision.refusal)
            self.counts["refused"] += 1
            return
        must(
            decision.restore == best,
            "all go back to the newest good step",
            f"to {decision.restore}, {best} is there",
        )
        if best is None:
            must(not stored.steps, "no silent fresh start", str(stored))
        self.counts["restored by another world" if decision.saved_world else "restored"] += 1
        epoch = decision.id.epoch
        self.job = JobFacts(JOB, world, epoch, epoch, decision.restore, 0, decision)
        self.step = decision.restore.step if decision.restore else 0
        if decision.restore and not decision.saved_world:
            for member in self.members:
                self.held[member.home] = [(member.shard, decision.restore, world)]

    def _decided(
        self, view: TierView, known: JobFacts | None, homes: list[Home], *, able: bool
    ) -> Decision:
        """Decide, have all ranks read, decide again; the same for all, or nothing."""
        for _ in range(MOST_DECISIONS):
            slots = {
                home: SlotFacts(
                    0,
                    "up",
                    TrainerFacts(
                        JOB, "run", 0, f"{self.now_s} {shard}", shard, len(homes), waiting=True,
                        reshard=able,
                    ),
                )
                for shard, home in enumerate(homes)
            }  # fmt: skip
            floor = 2 + int(100 * self.now_s)  # the clock outruns any course of decisions
            now = Situation(JOB, slots, known, (), PATIENCE_S, 0.0, "a", 4, 1, floor, view)
            outcome = decide(now)
            must(not isinstance(outcome, Wait), "a tier that was seen is decided on", str(outcome))
            assert isinstance(outcome, Decision)
            if outcome.restore is None:
                return outcome
            must(outcome.tier is Tier.PERSISTENT, "one tier for all", str(outcome.tier))
            failed = self._staged(outcome, slots)
            if not failed:
                return outcome
            view = learned(view, outcome, failed)
        raise Violation("what is damaged is not decided on again", str(view))

    def _staged(self, decision: Decision, slots: dict[Home, SlotFacts]) -> dict[Home, SlotFacts]:
        """What the slots say that cannot load; empty where all can, and have the right bytes."""
        assert decision.restore is not None
        saved = decision.saved_world or decision.world
        failed = {}
        for home, facts in slots.items():
            trainer = facts.trainer
            assert trainer is not None
            try:
                for shard in range(trainer.shard, saved, decision.world):
                    record = self.store.indexed_seal(decision.restore, shard)
                    found = b"".join(self.store.read(decision.restore, record))
                    right = found == image_of(shard, decision.restore)
                    must(
                        right, "restored bytes are the trainer's", f"{shard} of {decision.restore}"
                    )
            except DamagedBytes as error:
                told = replace(trainer, decision=decision.id, failure=str(error), damaged=True)
                failed[home] = replace(facts, trainer=told)
        return failed

    # -- a run

    def turn(self, chance: float) -> None:
        self.now_s += self.random.random()
        for home in self.random.sample(HOMES, len(HOMES)):
            if self.random.random() < 0.7:
                self.heard[home] = self.facts(home)
            self.conclude(home)
        self.finish(chance)
        if self.random.random() < chance:
            self.restart(self.random.choice(HOMES))
        if self.random.random() < chance / 3:
            self.lose_all()

    def run(self) -> None:
        """Under faults; then in peace the restore point becomes whole, and nothing is left over."""
        self.commit()
        for _ in range(150):
            self.turn(0.06)
            if self.random.random() < 0.2:
                self.commit()
        for _ in range(12):
            self.step += SCHEDULE.every_steps
            self.commit()
            for _ in range(40):
                self.turn(0.0)
            self.now_s += RETRY_LAST_S
        stored = self.store.look()
        newest = max(s.version for s in stored.steps)
        must(newest == self.job.committed, "it always goes on", f"{newest}: {self.job.committed}")
        must(not stored.unfinished, "nothing is left over", str(stored.unfinished))
