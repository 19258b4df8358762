"""The simulated launcher: starts all ranks, anew when one ends, on whatever machines there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clock import about
from .trainer import Gang, Trainer

if TYPE_CHECKING:
    from .cluster import Cluster
    from .slot import Slot

RESTART_S = 0.15
POLL_S = 0.1
STUCK_S = 8.0  # it gives up on ranks that were not answered, or make no step


class Launcher:
    """What torchrun is to a real job, and the user before it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._chance = cluster.chance("launcher")
        self.nodes = cluster.setup.nodes  # that the job runs on now
        # Mostly trainers can take up another world, or none can; rarely some.
        self._able = cluster.chance("layouts").choice([0.0, 1.0, 1.0, 1.0, 1.0, 0.5])
        self.gang: Gang | None = None
        self.alone = False  # nobody starts the trainers again for now
        self.leave_one = False  # the next relaunch misses a rank of the old run
        self._resized: tuple[int, bool] | None = None  # nodes of the next launch; begin anew?
        self._before = self.nodes
        self._begin_anew = False
        self._plan: tuple[int, bool] | None = None
        self._launches = 0
        self._launching = False
        self._progress = (-1, 0.0)

    @property
    def launching(self) -> bool:
        return self._launching

    def launch_soon(self) -> None:
        if not self._launching and not self.alone:
            self._launching = True
            self._cluster.clock.after(about(self._chance, RESTART_S), self.launch)

    def resize(self, nodes: int, *, anew: bool) -> None:
        """The user starts the job with another number of nodes; if refused, chooses."""
        self._resized = (nodes, anew)
        self.launch_soon()

    def launch(self) -> None:
        """All ranks anew, in whatever order."""
        cluster, self._launching = self._cluster, False
        if self.alone:
            return
        if self._plan is None:
            self._plan = self._settle_refusal()
        self.nodes, allow_fresh = self._plan
        machines = [n for n in cluster.nodes.values() if not n.gone and n.board is not None]
        if len(machines) < self.nodes:
            self.launch_soon()
            return
        self._plan = None
        if self._chance.random() < 0.5:
            self._chance.shuffle(machines)
        homes = [s for n in machines[: self.nodes] for s in n.slots]
        self._kill_gang(homes)
        if allow_fresh:
            cluster.oracle.forgotten()
        self._launches += 1
        self.gang = gang = Gang(
            len(homes), str(self._launches), allow_fresh=allow_fresh, able=self._able
        )
        for shard, slot in enumerate(homes):
            trainer = Trainer(cluster, gang, shard, slot, f"{self._launches}.{shard}")
            gang.trainers.append(trainer)
            cluster.clock.after(about(self._chance, 0.05), trainer.connect)
        if self._able == 1.0:
            cluster.oracle.asked(tuple(t.incarnation for t in gang.trainers))
        self._progress = (-1, cluster.clock.now_s)

    def leave_alone(self) -> None:
        """All ranks end, and nobody looks after the job until `come_back`."""
        self.alone = True
        for trainer in self.gang.trainers if self.gang else ():
            trainer.die()

    def come_back(self) -> None:
        """The job is started again."""
        if self.alone:
            self.alone = False
            self.launch_soon()

    def _settle_refusal(self) -> tuple[int, bool]:
        """On how many nodes the user starts the job next, and whether it may begin anew."""
        gang, resized = self.gang, self._resized
        if resized is not None:
            self._before, self._resized = self.nodes, None
            self._begin_anew = resized[1]
            return resized[0], False
        before, self._before = self._before, self.nodes
        if gang is None or not any(t.refused for t in gang.trainers):
            return self.nodes, gang is not None and gang.allow_fresh and not gang.trains
        too_few = self.nodes <= self._cluster.setup.parity
        if too_few or (self.nodes != before and not self._begin_anew):
            self._before = self._cluster.setup.nodes
            return self._before, False
        return self.nodes, True

    def _kill_gang(self, wanted: list[Slot]) -> None:
        trainers = self.gang.trainers if self.gang else []
        spared = [t for t in trainers if not t.dead and t.slot not in wanted]
        left = spared[0] if spared and self.leave_one else None
        self.leave_one = False
        for trainer in trainers:
            if trainer is not left:
                trainer.die()
        if left is not None:
            self._cluster.injected["trainer left over"] += 1
            self._cluster.clock.after(about(self._chance, 0.8), left.die)

    def watch(self) -> None:
        """Looks after its ranks."""
        gang, now_s = self.gang, self._cluster.clock.now_s
        self._cluster.clock.after(POLL_S, self.watch)
        if gang is None or self._cluster.quiet:
            return
        done = min(gang.done)
        if done != self._progress[0]:
            self._progress = (done, now_s)
        if gang.broken or now_s - self._progress[1] > STUCK_S:
            self.launch_soon()
