"""The launcher: four trainers that take each step together, and start together when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapshotd.wire.protocol import FRONT_SOCKET
from tests.integration.soak import sandbox
from tests.integration.soak.ledger import RESTORE_BOUND_S, STEP_BOUND_S, Ledger
from tests.integration.soak.node import Node
from tests.integration.soak.trainer import Reference

JOB = "soak"
_PAUSE_AFTER_ERROR_S = 1.0
_CLOSE_S = 10.0
_SAY_S = 3.0

Message = dict[str, Any]


@dataclass
class Trainer:
    """One rank of one life."""

    rank: int
    node: Node
    pid: int = 0
    writer: asyncio.StreamWriter | None = None
    connected: bool = False
    resumed: bool = False
    arrived: bool = False
    closed: bool = False
    error: str = ""
    committed: int | None = None
    safe: int = -1  # newest committed step, told while this rank was connected and protected
    asking_s: float | None = None


@dataclass
class Life:
    """One start of all ranks."""

    number: int
    on_lost: str
    trainers: list[Trainer]
    over: asyncio.Event = field(default_factory=asyncio.Event)
    forked: asyncio.Event = field(default_factory=asyncio.Event)
    step: int | None = None  # that the ranks are taking, or have restored
    began: dict[int, int] = field(default_factory=dict)  # step -> its number among all steps begun
    errors: int = 0


class Launcher:
    """Runs the job on `homes`, one rank each, until `stop`."""

    def __init__(
        self, homes: list[Node], root: Path, ledger: Ledger, rng: random.Random, step_s: float
    ) -> None:
        self.homes = homes
        self.world = len(homes)
        self.life: Life | None = None
        self.begun = 0  # steps, over all lives
        self.on_lost = "raise"
        self.ended = False
        self.reference = Reference(self.world)
        self._ledger, self._rng, self._step_s = ledger, rng, step_s
        self._socket = root / "run" / "launcher.sock"
        self._lives = 0
        self._stops: dict[int, list[list[float]]] = {}
        self._zygote: asyncio.StreamWriter | None = None
        self._zygote_there = asyncio.Event()
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last_go_s = 0.0
        self._holds = 0
        self._may_begin = asyncio.Event()
        self._may_begin.set()

    # -- life

    async def start(self, log: Path) -> None:
        """Be ready to start trainers."""
        self._server = await asyncio.start_unix_server(self._serve, self._socket)
        arguments = ["-m", "tests.integration.soak.trainer", str(self._socket)]
        sandbox.spawn(None, arguments, {**os.environ, "OMP_NUM_THREADS": "1"}, log)
        async with asyncio.timeout(60):
            await self._zygote_there.wait()
        self._runner = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while not self.ended:
            self.life = life = await self._begin()
            await life.over.wait()
            await self._end(life)
            if life.errors:
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async def _begin(self) -> Life:
        # Where there is a socket, a trainer waits by itself for whoever will answer there.
        while True:
            await self._may_begin.wait()
            late = [n for n in self.homes if not (n.run_dir / FRONT_SOCKET).exists()]
            if not late:
                break
            await late[0].up()
        trainers = [Trainer(rank, node) for rank, node in enumerate(self.homes)]
        life = Life(self._lives, self.on_lost, trainers)
        self._lives += 1
        self.life = life
        self._ledger.counts["starts of all ranks"] += 1
        homes = " ".join(t.node.name for t in trainers)
        self._ledger.note(f"life {life.number} begins on {homes}, on_lost={life.on_lost}")
        for trainer in trainers:
            self._order_zygote(
                life=life.number, rank=trainer.rank, world=self.world, job=JOB,
                run_dir=str(trainer.node.run_dir), on_lost=life.on_lost,
            )  # fmt: skip
        await life.forked.wait()
        return life

    async def _end(self, life: Life) -> None:
        """As torchrun does: when one is gone, the others are ended."""
        gone = asyncio.gather(*(sandbox.ended(t.pid) for t in life.trainers))
        if self.ended or life.errors:
            # They end by themselves, and what they have to say is wanted.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S if self.ended else _SAY_S):
                    await asyncio.shield(gone)
        gentle = self._rng.random() < 0.5
        for trainer in life.trainers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer.pid, signal.SIGTERM if gentle else signal.SIGKILL)
                os.kill(trainer.pid, signal.SIGCONT)
        await gone
        self._check_outcome(life)
        for trainer in life.trainers:
            self._stops.pop(trainer.pid, None)
        self._ledger.note(f"life {life.number} is over")

    def _check_outcome(self, life: Life) -> None:
        lost = [t.rank for t in life.trainers if t.error == "SnapshotLost"]
        loaded = [t.rank for t in life.trainers if t.resumed]
        if lost and loaded:
            self._ledger.fail(f"life {life.number}: {lost} were told of a loss, {loaded} resumed")
        if lost:
            all_of_them = "all" if len(lost) == self.world else "some"
            self._ledger.counts[f"losses beyond parity, told to {all_of_them} ranks"] += 1
            self.on_lost = "fresh"

    async def stop(self) -> None:
        """Every trainer closes its Snapshotter and ends."""
        self.ended = True
        life = self.life
        assert life is not None
        await self._until(lambda: all(t.arrived for t in life.trainers) or life.over.is_set(), 30)
        for trainer in life.trainers:
            self._send(trainer, do="end")
        async with asyncio.timeout(30):
            await self._runner
        if not all(t.closed for t in life.trainers):
            self._ledger.fail("a trainer did not close its Snapshotter at the end")

    async def close(self) -> None:
        """End without ceremony."""
        self.ended = True
        self._runner.cancel()
        await asyncio.gather(self._runner, return_exceptions=True)
        if self._zygote is not None:
            self._zygote.close()
        for trainer in self.life.trainers if self.life else ():
            if trainer.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trainer.pid, signal.SIGKILL)
                await sandbox.ended(trainer.pid)
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.unlink(missing_ok=True)

    # -- faults

    def trainer_of(self, node: Node) -> Trainer | None:
        """The trainer that runs on a node, or is just being ended there."""
        trainers = self.life.trainers if self.life else []
        return next((t for t in trainers if t.node is node and t.pid), None)

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """No trainer is started meanwhile; those of the present life are all known."""
        self._holds += 1
        self._may_begin.clear()
        try:
            if self.life is not None:
                await self.life.forked.wait()
            yield
        finally:
            self._holds -= 1
            if self._holds == 0:
                self._may_begin.set()

    async def kill_trainer(self, node: Node) -> None:
        trainer = self.trainer_of(node)
        if trainer is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer.pid, signal.SIGKILL)
            await sandbox.ended(trainer.pid)

    def stopped(self, pid: int) -> None:
        """A process was stopped by us: what it measures now is not the daemons' doing."""
        self._stops.setdefault(pid, []).append([self._now_s(), float("inf")])

    def continued(self, pid: int) -> None:
        if pid in self._stops:
            self._stops[pid][-1][1] = self._now_s()

    def _own_s(self, trainer: Trainer, span: list[float]) -> float:
        """Length of a span without the time that the trainer was stopped."""
        began_s, ended_s = span
        stops = self._stops.get(trainer.pid, [])
        stopped_s = sum(max(0.0, min(b, ended_s) - max(a, began_s)) for a, b in stops)
        return ended_s - began_s - stopped_s

    # -- what is known of protection

    def safe_since(self, begun: int) -> bool:
        """Whether a step that was begun after `begun` steps is committed."""
        life = self.life
        if life is None or life.step is None:
            return False
        return any(life.began.get(t.safe, -1) > begun for t in life.trainers)

    async def protected_after(self, begun: int, timeout_s: float) -> bool:
        """Wait until every rank was told that a step begun after `begun` steps is committed."""

        def safe() -> bool:
            life = self.life
            return life is not None and all(
                life.began.get(t.safe, -1) > begun for t in life.trainers
            )

        return await self._until(safe, timeout_s)

    async def _until(self, condition, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with self._news, asyncio.timeout(timeout_s):
                await self._news.wait_for(condition)
            return True
        return bool(condition())

    async def _tell_news(self) -> None:
        async with self._news:
            self._news.notify_all()

    # -- connections

    def _order_zygote(self, **order: object) -> None:
        assert self._zygote is not None
        self._zygote.write(json.dumps(order).encode() + b"\n")

    def _send(self, trainer: Trainer, **order: object) -> None:
        if trainer.writer is not None:
            trainer.writer.write(json.dumps(order).encode() + b"\n")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._talk(reader, writer)
        except ConnectionError:
            pass
        except Exception as error:  # a bug of the soak must not pass for silence
            self._ledger.fail(f"the launcher itself: {error!r}")
            raise
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = json.loads(await reader.readline() or "{}")
        if "zygote" in first:
            self._zygote = writer
            self._zygote_there.set()
            while line := await reader.readline():
                self._forked(json.loads(line))
            return
        life = self.life
        if life is None or first.get("life") != life.number:
            return
        trainer = life.trainers[first["rank"]]
        trainer.writer = writer
        while line := await reader.readline():
            self._hear(life, trainer, json.loads(line))
            await self._tell_news()
        life.over.set()
        await self._tell_news()

    def _forked(self, message: Message) -> None:
        life = self.life
        assert life is not None
        assert life.number == message["life"]
        trainer = life.trainers[message["rank"]]
        trainer.pid = message["forked"]
        task = asyncio.get_running_loop().create_task(self._watch(life, trainer.pid))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if all(t.pid for t in life.trainers):
            life.forked.set()

    async def _watch(self, life: Life, pid: int) -> None:
        await sandbox.ended(pid)
        life.over.set()

    # -- what trainers say

    def _hear(self, life: Life, trainer: Trainer, message: Message) -> None:
        if "asking" in message:
            trainer.asking_s = message["asking"]
        elif "restored" in message:
            self._resumed(life, trainer, message)
        elif "step" in message:
            self._stepped(life, trainer, message)
        elif "closed" in message:
            trainer.closed = True
        elif "error" in message:
            trainer.error = message["error"]
            life.errors += 1
            self._ledger.trainer_error(
                trainer.rank, message["error"], message["code"], message["text"]
            )

    def _resumed(self, life: Life, trainer: Trainer, message: Message) -> None:
        rank, step = trainer.rank, message["restored"]
        ledger = self._ledger
        ledger.note(f"life {life.number} rank {rank} resumes from {step} ({message['tier']})")
        ledger.resumed(rank, step, message["tier"], fresh_is_fine=life.on_lost == "fresh")
        if life.step is not None and step != life.step:
            ledger.fail(f"rank {rank} resumes from step {step}, another one from {life.step}")
        if step >= 0 and message["seen"] != step * 10:
            ledger.fail(f"rank {rank} got the values of {message['seen']} with step {step}")
        self._check_digest(rank, step, message["digest"], "after restore()")
        took_s = self._own_s(trainer, message["span"])
        ledger.blocked("restore()", took_s, f"rank {rank} in life {life.number}", RESTORE_BOUND_S)
        ledger.counts["bytes decoded at restores"] += message["decoded"]
        ledger.counts["bytes copied at restores"] += message["copied"]
        life.step = step
        trainer.resumed = trainer.arrived = True
        if step < 0 and all(t.resumed for t in life.trainers):
            ledger.counts["fresh starts"] += 1
        self._go_if_all_are_there(life)

    def _stepped(self, life: Life, trainer: Trainer, message: Message) -> None:
        rank, step = trainer.rank, message["step"]
        ledger = self._ledger
        ledger.counts["rank steps"] += 1
        self._check_digest(rank, step, message["digest"], "in training")
        took_s = self._own_s(trainer, message["span"])
        ledger.blocked(
            "step()", took_s, f"rank {rank} at step {step} of life {life.number}", STEP_BOUND_S
        )
        if message["committed"] is not None:
            committed = message["committed"][1]
            if committed != trainer.committed:
                ledger.counts["commits told to ranks"] += 1
            ledger.commit_told(rank, committed, trainer.committed)
            trainer.committed = committed
            if message["protected"] and message["connected"]:
                trainer.safe = committed
        trainer.arrived = True
        self._go_if_all_are_there(life)

    def _check_digest(self, rank: int, step: int, digest: str, when: str) -> None:
        if digest != self.reference.digest(rank, step + 1):
            self._ledger.fail(f"rank {rank} differs from the reference at step {step} {when}")

    def _go_if_all_are_there(self, life: Life) -> None:
        if not all(t.arrived for t in life.trainers) or life.over.is_set():
            return
        at_s = max(self._now_s(), self._last_go_s + self._step_s)
        self._last_go_s = at_s
        asyncio.get_running_loop().call_at(at_s, self._go, life)

    def _go(self, life: Life) -> None:
        if life.over.is_set() or self.ended:
            return
        assert life.step is not None
        if life.step < 0:
            self._ledger.told = None
        # A fresh start, or what was found in its place: from here on nothing may be lost again.
        self.on_lost = "raise"
        if self._ledger.beyond and not life.began:  # not the life in which the losses strike
            self._ledger.told = life.step if life.step >= 0 else None
            self._ledger.beyond = False
        life.step += 1
        self.begun += 1
        self._ledger.counts["steps"] += 1
        life.began[life.step] = self.begun
        for trainer in life.trainers:
            trainer.arrived = False
            self._send(trainer, do="step")

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()
