"""Homes that persist together under seeded faults: only whole steps, and it always goes on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

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
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    SlotFacts,
    Stored,
    StoredStep,
    Version,
)

HOMES = [Home(n, 0) for n in "abc"]
SCHEDULE = Schedule(0.0, 3, 2, 4)


@dataclass
class Tier:
    """What is there: records of shards by version, and whole steps."""

    seals: dict[Version, set[int]] = field(default_factory=dict)
    whole: dict[Version, StoredStep] = field(default_factory=dict)

    def look(self) -> Stored:
        return Stored(tuple(self.whole.values()), tuple(sorted(set(self.seals) - set(self.whole))))


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tier = Tier()
        self.now_s = 0.0
        self.epoch = 1
        self.step = 0
        self.point = Version(1, 0)
        self.members = [*HOMES]
        self.minds = {h: Persistence(h, SCHEDULE) for h in HOMES}
        self.heard: dict[Home, SlotFacts] = {}
        self.held: dict[Home, list[Version]] = {h: [] for h in HOMES}
        self.tasks: list[tuple[Home, object]] = []
        self.ever: list[Version] = []

    def job(self) -> JobFacts:
        members = tuple(Member(s, h) for s, h in enumerate(self.members))
        ident = DecisionId(self.epoch, "a")
        decision = Decision(ident, "job", 3, (Group(members, 1),), ("x", "y", "z"))
        return JobFacts("job", 3, self.epoch, self.epoch, self.point, self.epoch, decision)

    def commit(self) -> None:
        self.step += 1
        self.point = Version(self.epoch, self.step)
        for home in HOMES:
            self.held[home] = [*self.held[home][-1:], self.point]

    def facts(self, home: Home) -> SlotFacts:
        shard = self.members.index(home)
        data = tuple(DataHolding("job", shard, v, 9, b"d") for v in self.held[home])
        return SlotFacts(0, "up", data=data, persist=self.minds[home].facts())

    def conclude(self, home: Home) -> None:
        slots = {**self.heard, home: self.facts(home)}
        for told in self.minds[home].instructions([self.job()], slots, self.now_s, self.now_s):
            if isinstance(told, Stop):
                for task in [t for t in self.tasks if t[0] == home and isinstance(t[1], Write)]:
                    self.tasks.remove(task)
                    self.minds[home].stopped(task[1])
            else:
                running = [t for h, t in self.tasks if h == home and type(t) is type(told)]
                assert not running, f"{told} beside {running}"
                self.tasks.append((home, told))

    def finish(self, faults: float) -> None:
        """Some task comes to its end."""
        if not self.tasks:
            return
        home, task = self.tasks.pop(self.random.randrange(len(self.tasks)))
        mind, fails = self.minds[home], self.random.random() < faults
        match task:
            case Look(job):
                if fails:
                    mind.failed(job, "away", self.now_s)
                else:
                    mind.looked(job, self.tier.look())
            case Write(_, shard, version):
                if fails or version not in self.held[home]:
                    mind.gone(task, "freed")
                else:
                    self.tier.seals.setdefault(version, set()).add(shard)
                    mind.wrote(task)
            case Publish(job, version, world, number):
                if fails:
                    mind.failed(job, "away", self.now_s)
                    return
                assert self.tier.seals[version] == {0, 1, 2}, "only whole steps"
                assert version not in self.ever, "each once"
                self.ever.append(version)
                self.tier.whole[version] = StoredStep(version, world, number, self.now_s)
                for old in [
                    *removable(self.tier.whole.values(), SCHEDULE),
                    *leftovers(self.tier.look(), version),
                ]:
                    self.tier.whole.pop(old, None)
                    self.tier.seals.pop(old)
                assert version in self.tier.whole
                mind.published(job, version, self.tier.look())

    def restart(self, home: Home) -> None:
        """Its SMP dies with what it knew; its bytes stay."""
        self.minds[home] = Persistence(home, SCHEDULE)
        self.tasks = [t for t in self.tasks if t[0] != home]

    def move(self) -> None:
        """A restore: the restore point comes to other homes, under another epoch."""
        self.epoch += 1
        self.random.shuffle(self.members)
        self.held = {h: [self.point] for h in HOMES}

    def turn(self, faults: float) -> None:
        self.now_s += self.random.random()
        for home in self.random.sample(HOMES, 3):
            if self.random.random() < 0.7:
                self.heard[home] = self.facts(home)
            self.conclude(home)
        self.finish(faults)
        if self.random.random() < faults / 4:
            self.restart(self.random.choice(HOMES))
        if self.random.random() < faults / 8:
            self.move()


@pytest.mark.parametrize("seed", range(20))
def test_only_whole_steps_and_it_always_goes_on(seed: int) -> None:
    world = World(seed)
    world.commit()
    for _ in range(250):
        world.turn(0.2)
        if world.random.random() < 0.2:
            world.commit()
    published = len(world.ever)
    world.commit()
    # No more faults, and nothing more is committed: the last step is whole in the end.
    for _ in range(12):
        world.step += SCHEDULE.every_steps
        world.commit()
        for _ in range(30):
            world.turn(0.0)
        world.now_s += RETRY_LAST_S
    assert len(world.ever) > published
    assert world.ever[-1] == world.point
    assert len(world.ever) == len(set(world.ever))
    assert not set(world.tier.seals) - set(world.tier.whole), "leftovers are gone"
