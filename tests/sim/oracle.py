"""What must hold after each event, checked against what really lies in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from snapshotd.core.instructions import Encode
from snapshotd.core.recovery import Missing, candidates, survey, world_of
from snapshotd.core.restore import within_lineage
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Home,
    JobFacts,
    NodeFacts,
    ParityHolding,
    RefusalKind,
    TrainerFacts,
    Version,
)

from .answers import Answers
from .memory import Block, Holding, Key, digest, key_of, row_of
from .promise import Promise, facts_of
from .trainer import JOB, Trainer
from .violation import Violation, must

if TYPE_CHECKING:
    from .cluster import Cluster
    from .node import Node
    from .slot import Slot

#: What a node did or heard this long ago, every other has heard of, where nothing troubles them.
HEARD_S = 1.2
_PointKey = tuple[int, int, Version]


class Oracle:
    """The observer who sees everything at once."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._truth: dict[tuple[int, Version], bytes] = {}
        self._digests: dict[tuple[int, Version], bytes] = {}
        self._sealed: set[tuple[int, Version]] = set()
        self._stood: set[tuple[Home, Key, int]] = set()
        self._had: dict[Home, set[Key]] = defaultdict(set)
        self._answers = Answers(cluster)
        self._decisions: dict[DecisionId, Decision] = {}
        self._points: dict[str, JobFacts] = {}  # node -> what it said last
        self._heard: dict[tuple[str, int, str], tuple[str, int]] = {}
        self._seen: set[_PointKey] = set()
        self._begun: set[int] = {0}
        self._able: set[tuple[str, ...]] = set()  # starts whose trainers take up another world
        self.point: JobFacts | None = None  # newest restore point anybody knows
        self.promise: Promise | None = None
        self._promised_s = 0.0
        self.rows_given_up = 0
        self.commits = self.restores = self.refusals = self.fallbacks = self.fresh = 0

    # -- told by the simulation: the trainers' bytes

    def wrote(self, shard: int, version: Version, image: bytes) -> None:
        before = self._truth.setdefault((shard, version), image)
        must(before == image, "a version names one state", f"{version} of shard {shard}")
        self._digests[shard, version] = digest(image)

    def restored(self, shard: int, version: Version, image: bytes) -> None:
        right = self._truth.get((shard, version)) == image
        must(right, "restored bytes are the trainer's", f"shard {shard} of {version}")
        self.restores += 1

    def answered(self, trainer: Trainer, decision: Decision) -> None:
        """A trainer gets its answer; where a version is restored, all have staged it."""
        self._answers.given(trainer, decision)
        if decision.refusal:
            self.refusals += 1
            return
        for group in decision.groups if not decision.saved_world else ():
            for member in group.members if decision.restore else ():
                key: Key = (JOB, decision.restore or Version(0, 0), member.shard)
                staged = key in self._had[member.home]
                text = f"rank {trainer.shard} of {decision.id}: {member.home}"
                must(staged, "an answer comes when all have staged", text)

    def unremembered(self, epoch: int) -> None:
        """Nothing is left of an epoch: whatever was written in it need not be told apart."""
        for written in (self._truth, self._digests):
            for named in [n for n in written if n[1].epoch == epoch]:
                del written[named]
        self._sealed = {n for n in self._sealed if n[1].epoch != epoch}
        self._stood = {n for n in self._stood if n[1][1].epoch != epoch}
        for home, keys in self._had.items():
            self._had[home] = {key for key in keys if key[1].epoch != epoch}
        if self.point is not None and self.point.lineage == epoch:
            self.forgotten()

    def attached(self, slot: Slot, trainer: TrainerFacts) -> None:
        assert slot.machine is not None, "it was attached to"
        job = slot.machine.orders.job(JOB)
        over = job and trainer.decision and trainer.decision.epoch < job.lineage
        must(not over, "an older epoch never counts", f"a trainer of {trainer.decision} attached")

    def requested(self, home: Home, owner: str, incarnation: str) -> None:
        must(owner == incarnation, "a dead trainer is not heard", f"{incarnation} at {home}")

    # -- told by the simulation: memories

    def stands(self, home: Home, key: Key, image_bytes: int) -> None:
        """A trainer has said that part of an image of so many bytes may be read."""
        self._stood.add((home, key, image_bytes))

    def codes(self, task: Encode) -> None:
        """Whoever codes a stripe has heard of each shard where it is, or is being written."""
        for member, image_bytes in zip(task.group.members, task.shard_bytes, strict=True):
            home, key = member.home, (task.job, task.version, member.shard)
            had = key in self._had[home]
            had = had and image_bytes == len(self._truth[member.shard, task.version])
            text = f"{image_bytes} bytes of {key} at {home}"
            must(had or (home, key, image_bytes) in self._stood, "what is coded was there", text)

    def kept(self, home: Home, holding: Holding, image: bytes) -> None:
        if isinstance(holding, ParityHolding):
            self._check_row(home, holding, image)
        else:
            self._sealed.add((holding.shard, holding.version))
        self._had[home].add(key_of(holding))
        promise = self.promise
        if promise is not None and home in promise.lost:
            promise.refilled(home, self._cluster.memories().get(home, {}))

    def served(self, home: Home, block: Block) -> None:
        held = block.holding
        right = _sound(block)
        if isinstance(held, DataHolding):
            right = right and self._truth.get((held.shard, held.version)) == block.image
        must(right, "no wrong byte is served", f"{key_of(held)} at {home}")

    def stored(self, home: Home, epoch: int, holding: Holding) -> None:
        slot = self._cluster.slot(home)
        job = slot.machine.orders.job(JOB) if slot and slot.machine else None
        over = job is not None and epoch < job.lineage
        must(not over, "an older epoch never counts", f"{holding.version} stored at {home}")

    def freed(self, home: Home, holding: Holding, reason: str) -> None:
        promise = self.promise
        if promise is None or home in promise.lost:
            return
        if key_of(holding) in promise.parts.get(home, ()):
            self._check("what is owed is not freed", f"{home} freed {key_of(holding)}: {reason}")

    def memory_lost(self, homes: Iterable[Home]) -> None:
        """Not by anyone's decision: a machine is gone, or a block damaged."""
        promise = self.promise
        lost = [h for h in homes if promise is not None and h in promise.parts]
        if promise is not None and lost:
            promise.lost.update(lost)
            self._check("what was lost is bearable", f"{lost[0]} lost its memory")

    def part_lost(self, home: Home, key: Key) -> None:
        """A bit was flipped."""
        if self.promise is not None and key in self.promise.parts.get(home, ()):
            self.memory_lost([home])

    def sheltered(self, promise: Promise) -> None:
        """Those who remain protect the restore point: losses count from now."""
        self.promise, self._promised_s = promise, self._cluster.clock.now_s

    def forgotten(self) -> None:
        """The operator chose to begin anew."""
        self.point, self.promise = None, None

    # -- told by the simulation: conclusions

    def heard(self, node: Node, facts: NodeFacts) -> None:
        """An older message of a node never replaces a newer one."""
        assert node.board is not None, "it heard"
        taken = node.board.membership.live(self._cluster.clock.now_s).get(facts.node)
        if taken is None:
            return
        key = (node.name, node.boots, facts.node)
        now = (taken.boot, taken.sequence)
        must(now >= self._heard.get(key, now), "facts grow newer", f"{now} of {facts.node}")
        self._heard[key] = now
        if facts.boot < taken.boot:
            self._cluster.seen["late facts of a dead process"] += 1

    def restarted(self, node: str) -> None:
        """A node without its records may know less than it did."""
        self._points.pop(node, None)

    def concluded(self, node: Node, jobs: tuple[JobFacts, ...]) -> None:
        job = next((j for j in jobs if j.job == JOB), None)
        before = self._points.get(node.name)
        if job is None or job is before or job == before:
            return
        if before is not None:
            _check_forward(node.name, before, job)
        self._answers.concluded(node.name, before, job)
        self._points[node.name] = job
        if job.economy.rows_less:
            self._saving(job)
        if job.pending is not None and job.pending.id not in self._decisions:
            self._decided(node, job.pending)
        if self.point is None or _key(job) > _key(self.point):
            self._take(job)

    def _saving(self, job: JobFacts) -> None:
        """Parity is given up: whoever knows it may free the rows at once."""
        promise = self.promise
        self.rows_given_up = max(self.rows_given_up, job.economy.rows_less)
        rows = max(0, self._cluster.setup.parity - job.economy.rows_less)
        if promise is not None and job.lineage == promise.point.lineage and rows < promise.bearable:
            promise.lower(rows, self._cluster.memories())

    def _rows(self, lineage: int) -> int:
        """Parity rows that nobody gives up now."""
        less = [j.economy.rows_less for j in self._points.values() if j.lineage == lineage]
        return max(0, self._cluster.setup.parity - max(less, default=0))

    def _decided(self, node: Node, decision: Decision) -> None:
        """Judged once, when the node that states it knows it and nobody else."""
        self._decisions[decision.id] = decision
        text = f"{decision.id} by {node.name}"
        for slot in node.slots:
            newest = max((k[1].epoch for k in slot.memory), default=0)
            must(newest < decision.id.epoch, "an epoch is newer than all that is held", text)
        if decision.restore is not None:
            world = decision.saved_world or decision.world
            wrote = {s for s, v in self._truth if v == decision.restore}
            known = wrote == set(range(world))
            must(known, "only what every rank wrote is restored", f"{text}: {decision.restore}")
        promise, now_s = self.promise, self._cluster.clock.now_s
        if decision.refusal_kind is RefusalKind.LOST and not self._cluster.away(node):
            self._check_lost(decision, text)
        if promise is None or self._of_another_world(decision, promise.point):
            return
        if now_s - self._promised_s < HEARD_S or not promise.owed(self._cluster.away(node)):
            return
        law = "nobody goes back further than he must"
        must(not decision.refusal, law, f"{text} refuses {promise.version}: {decision.refusal}")
        enough = decision.restore is not None and decision.restore >= promise.version
        must(enough, law, f"{text}: {decision.restore}, owed {promise.version}")

    def _of_another_world(self, decision: Decision, point: JobFacts) -> bool:
        """Whether its trainers cannot be given what is owed: they are not those who saved it."""
        if decision.world == point.saved_world:
            return False
        kinds = (RefusalKind.OTHER_WORLD, RefusalKind.CANNOT_PROTECT)
        return decision.refusal_kind in kinds or decision.incarnations not in self._able

    def asked(self, incarnations: tuple[str, ...]) -> None:
        """All trainers of a start can take up another world."""
        self._able.add(incarnations)

    def _check_lost(self, decision: Decision, text: str) -> None:
        """Who has heard of everybody and refuses has indeed nothing left."""
        point, slots = self.point, facts_of(self._cluster.memories())
        for version in candidates(slots, JOB):
            world = world_of(slots, JOB, version)
            able = world == decision.world or decision.incarnations in self._able
            if able and within_lineage(version, point):
                origins = survey(slots, JOB, world, version, {})
                lost = any(isinstance(o, Missing) for o in origins)
                must(lost, "what is there is not refused", f"{text}: {version} can be had")

    def _take(self, job: JobFacts) -> None:
        """A restore point nobody knew before."""
        self.point = job
        known_before = _key(job) in self._seen
        self._seen.add(_key(job))
        decision = self._decision_of(job)
        if job.committed is None:
            self.fresh += int(job.lineage not in self._begun)
            self._begun.add(job.lineage)
        if job.committed is None or known_before or decision is None:
            self.promise = None  # begun anew, or told again after the operator gave it up
        elif job.committed_in == job.lineage:
            self._commit(job, job.committed, decision)
        elif self.promise is not None and job.committed >= self.promise.version:
            self.promise.point = job  # until the new groups protect it, the old ones must
        else:
            self.fallbacks += int(self.promise is not None)
            self._promise(job, job.committed, decision, bearable=0)

    def _decision_of(self, job: JobFacts) -> Decision | None:
        """The decision that its lineage began with, where this node knows no more than a record."""
        return job.decision or self._answers.of(job.lineage)

    def _commit(self, job: JobFacts, version: Version, decision: Decision) -> None:
        self.commits += 1
        own = version.epoch == job.lineage or (
            version == decision.restore and not decision.saved_world
        )
        must(own, "an older epoch never counts", f"{version} committed in {job.lineage}")
        self._promise(job, version, decision, bearable=self._rows(job.lineage))

    def _promise(
        self, job: JobFacts, version: Version, decision: Decision, *, bearable: int
    ) -> None:
        memories = self._cluster.memories()
        promise = Promise(job, version, job.keeping, bearable)
        for home, keys in promise.lacking(memories).items():
            never = [k for k in keys if k not in self._had[home]]
            must(not never, "what counts was there", f"{version}: {home} never had {never}")
            promise.lost.add(home)
        self.promise, self._promised_s = promise, self._cluster.clock.now_s
        for home, parts in promise.parts.items():
            for key in parts if home not in promise.lost else ():
                block = memories[home][key]
                self._check_digests(block.holding, decision)
                if not _sound(block):
                    promise.lost.add(home)
        if promise.lost:
            self._check("what was lost is bearable", f"{version} was committed")

    def _check_digests(self, held: Holding, decision: Decision) -> None:
        if isinstance(held, DataHolding):
            right = self._digests.get((held.shard, held.version)) == held.content_digest
        else:
            wanted = [self._digests.get((s, held.version)) for s in held.place.shards]
            right = list(held.content_digests) == wanted
        must(right, "what counts was made of the sealed bytes", f"{key_of(held)} in {decision.id}")

    def _check_row(self, home: Home, held: ParityHolding, row: bytes) -> None:
        """A row that is stored is that of the sealed shards, all of them."""
        law, text = "parity is of the sealed bytes", f"{key_of(held)} at {home}"
        shards = [(shard, held.version) for shard in held.place.shards]
        must(self._sealed.issuperset(shards), law, text)
        must(row_of(held.place, [self._truth[shard] for shard in shards]) == row, law, text)

    # -- the laws

    def _check(self, law: str, why: str) -> None:
        promise = self.promise
        if promise is None or not promise.owed():
            return
        wide = max(g.size for g in promise.groups) > 8
        broken = promise.broken_by(self._cluster.memories(), further=not wide)
        if broken:
            text = f"{why}; then {broken} would leave nothing; owed {promise.version}"
            raise Violation(law, text)

    def spares(self, node: str) -> bool:
        """Whether this node's memory may be lost too, without asking more than is promised."""
        if self.promise is None:
            return True
        lost = {home.node for home in self.promise.lost} | {node}
        setup = self._cluster.setup
        return len(lost) <= self.promise.bearable + setup.losses - setup.parity

    def protected(self) -> bool:
        """Whether nothing of what the restore point needs is lacking anywhere."""
        promise, parity = self.promise, self._cluster.setup.parity
        if promise is None:
            return False
        memories = self._cluster.memories()
        lowered = promise.point.committed_in == promise.point.lineage
        if promise.bearable < parity == self._rows(promise.point.lineage) and lowered:
            full = Promise(promise.point, promise.version, promise.groups, parity)
            if not full.lacking(memories):
                self.promise = promise = full
        if promise.lost or promise.lacking(memories):
            return False
        return promise.bearable == parity


def _sound(block: Block) -> bool:
    return digest(block.image) == block.check


def _check_forward(node: str, before: JobFacts, now: JobFacts) -> None:
    law = "what is known only grows"
    must(now.epoch >= before.epoch, law, f"{node}: the epoch went back")
    must(now.lineage >= before.lineage, law, f"{node}: the lineage went back")
    if before.decision is not None:
        newer = now.decision is not None and now.decision.id >= before.decision.id
        must(newer, law, f"{node}: the decision went back")
    if now.lineage == before.lineage:
        grown = _version(now) >= _version(before)
        must(grown, "the watermark never moves back", f"{node}: {before.committed} {now.committed}")


def _version(job: JobFacts) -> Version:
    return job.committed or Version(0, 0)


def _key(job: JobFacts) -> _PointKey:
    return (job.lineage, job.committed_in, _version(job))
