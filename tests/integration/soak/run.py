"""One run: rounds of faults, each followed by a quiet time in which all must be well again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.integration.soak import faults, sandbox
from tests.integration.soak.launcher import JOB, Launcher
from tests.integration.soak.ledger import Ledger
from tests.integration.soak.network import Network
from tests.integration.soak.node import Around, Plan
from tests.integration.soak.nodes import Nodes
from tests.integration.soak.watch import Watch

WORLD = 4
HOSTS = 10
STEP_S = 0.1
ROUND_S = 60.0
BETWEEN_S = (2.0, 8.0)  # two faults; they may last longer
SAMPLE_S = 5.0
#: From the end of all faults until a new step is committed and told to every rank.
RECOVERY_S = 120.0
LOSS_RECOVERY_S = 240.0  # a refusal to all ranks, another start, a fresh one
TOO_MANY_EVERY = 4  # rounds


class Over(Exception):
    """Something failed, or somebody pressed Ctrl-C."""


@dataclass
class Run:
    """All parts of one run, in the order they depend on each other."""

    seed: int
    seconds: float
    root: Path
    logs: Path
    ledger: Ledger
    watch: Watch = field(default_factory=Watch)

    async def run(self) -> None:
        """Returns when the run is over, however it went; the ledger says how."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._over = asyncio.Event()
        self.ledger.on_failure = self._over.set
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupted)
        self._rng = random.Random(self.seed)
        parity = 1 + self.seed % 2
        reaper = sandbox.Reaper()
        self.network = Network(HOSTS, random.Random(self.seed))
        plan = Plan(self.root, self.logs, parity, WORLD)
        self.nodes = Nodes(self.network, plan, Around(reaper, self.ledger))
        homes = self.nodes.first(WORLD)
        self.launcher = Launcher(homes, self.root, self.ledger, self._rng, STEP_S)
        self.stage = faults.Stage(
            self.nodes, self.launcher, self.network, self.ledger, parity,
            keeper=self._rng.choice(homes).name,
        )  # fmt: skip
        self.ledger.note(f"seed {self.seed}, parity {parity}, keeper {self.stage.keeper}")
        try:
            await self._whole()
        except Over:
            if not self.ledger.failures:
                self.ledger.fail("interrupted")
            await self._note_status()
        finally:
            await self._clean_up()

    def _interrupted(self) -> None:
        self.ledger.fail("interrupted")

    # -- the run

    async def _whole(self) -> None:
        for node in self.launcher.homes:
            node.start()
        await asyncio.gather(*(node.up() for node in self.launcher.homes))
        await self.launcher.start(self.logs / "trainers.log")
        await self._well("at the start")
        watching = asyncio.get_running_loop().create_task(self._watch())
        try:
            end_s = asyncio.get_running_loop().time() + self.seconds
            number = 0
            while asyncio.get_running_loop().time() < end_s:
                number += 1
                await self._round(number, end_s)
        finally:
            watching.cancel()
        await self._finish()

    async def _round(self, number: int, end_s: float) -> None:
        loop = asyncio.get_running_loop()
        round_end_s = min(end_s, loop.time() + ROUND_S)
        acting: set[asyncio.Task[bool]] = set()
        try:
            while loop.time() < round_end_s:
                await self._pause(self._rng.uniform(*BETWEEN_S))
                acting.add(loop.create_task(self._strike()))
            await self._done(acting)
        finally:
            for act in acting:
                act.cancel()
            await asyncio.gather(*acting, return_exceptions=True)
        await self._well(f"after round {number}")
        if number % TOO_MANY_EVERY == 0:
            await self._done({loop.create_task(faults.lose_too_many(self.stage, self._rng))})
            await self._well(f"after too many losses in round {number}", LOSS_RECOVERY_S)
        self.watch.look_at_memory(self.launcher.homes)
        self.ledger.read_logs(self.logs)
        if self._over.is_set():
            raise Over

    async def _strike(self) -> bool:
        rng = random.Random(self._rng.random())
        kinds, weights = zip(*faults.ACTS.items(), strict=True)
        while True:
            (act,) = rng.choices(kinds, weights)
            if await act(self.stage, rng):
                return True

    async def _done(self, acting: set[asyncio.Task[bool]]) -> None:
        """Wait for acts to end; an error in one is an error of the soak."""
        over = asyncio.get_running_loop().create_task(self._over.wait())
        try:
            while acting:
                done, _ = await asyncio.wait({*acting, over}, return_when=asyncio.FIRST_COMPLETED)
                if over in done:
                    raise Over
                for act in done:
                    acting.discard(act)
                    act.result()
        finally:
            over.cancel()

    async def _pause(self, for_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                await self._over.wait()
            raise Over

    async def _well(self, when: str, bound_s: float = RECOVERY_S) -> None:
        """Nothing disturbs now: soon a new step is protected, and every rank knows it."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        waiting = loop.create_task(self.launcher.protected_after(self.launcher.begun, bound_s))
        await self._done({waiting})
        took_s = loop.time() - began_s
        if not waiting.result():
            self.ledger.fail(f"{when}: nothing is committed within {bound_s} s without faults")
        self.ledger.note(f"well {when}, within {took_s:.1f} s")
        self.ledger.blocked("recovery without faults", took_s, when, bound_s + 1)
        if self._over.is_set():
            raise Over

    async def _watch(self) -> None:
        while True:
            self.watch.look(list(self.nodes.all))
            await asyncio.sleep(SAMPLE_S)

    async def _note_status(self) -> None:
        for node in self.nodes.all:
            status = await node.status()
            text = str(status).replace("\n", " ")
            self.ledger.note(f"status of {node.name} at {node.address}: {text}")

    # -- the end

    async def _finish(self) -> None:
        """One last kill of everything, then an orderly end after which nothing is left."""
        homes = self.launcher.homes
        self.ledger.note("the last kill")
        for node in homes:
            node.kill()
            await self.launcher.kill_trainer(node)
        for node in homes:
            node.start()
        await self._well("after the last kill")
        self.watch.judge(self.ledger)
        await self.launcher.stop()
        await self._command("drop", JOB, "--yes", "--address", homes[0].address)
        await self._note_status()
        for node in homes:
            await node.stop()
            await self._command("gc", "--config", str(node.config))
            self._check_empty(node)
        for host in self.network.hosts:
            for left in sandbox.sockets_in(host.namespace):
                self.ledger.fail(f"a socket of host {host.number} is left: {left}")

    async def _command(self, *arguments: str) -> None:
        log = self.logs / "commands.log"
        pid = sandbox.spawn(None, ["-m", "snapshotd", *arguments], os.environ, log)
        code = await self.nodes._around.reaper.end_of(pid)
        if code != 0:
            self.ledger.fail(f"snapshotd {' '.join(arguments)} ended with {code}: see {log.name}")

    def _check_empty(self, node) -> None:
        locks = {"lock", ".budget.lock"}
        files = [p for p in node.memory.rglob("*") if p.is_file() and p.name not in locks]
        sockets = [p for p in node.run_dir.iterdir() if p.is_socket()]
        if files or sockets:
            self.ledger.fail(f"{node.name} leaves {[*map(str, files + sockets)]}")

    async def _clean_up(self) -> None:
        await self.launcher.close() if hasattr(self.launcher, "_runner") else None
        await self.nodes.close()
        self.network.close()
        await self._nobody_is_left()
        if left := sandbox.mounts_below(self.root):
            self.ledger.fail(f"mounts are left: {left}")
        if not self.ledger.failures:
            self.ledger.read_logs(self.logs)

    async def _nobody_is_left(self) -> None:
        mine = [p for p in psutil.process_iter() if p.pid != os.getpid()]
        ends = await asyncio.gather(*(_ended(p.pid) for p in mine), return_exceptions=True)
        for process, end in zip(mine, ends, strict=True):
            if isinstance(end, TimeoutError):
                self.ledger.fail(f"a process is left: {process}")


async def _ended(pid: int) -> None:
    async with asyncio.timeout(10):
        await sandbox.ended(pid)


def report(run: Run, took_s: float) -> dict[str, object]:
    """All counts of a run."""
    ledger = run.ledger
    return {
        "seed": run.seed,
        "parity": run.stage.parity,
        "minutes": round(took_s / 60, 2),
        "faults": dict(sorted(ledger.faults.items())),
        "faults_in_all": sum(ledger.faults.values()),
        "counts": dict(sorted(ledger.counts.items())),
        "ranks_restored_by_tier": dict(ledger.restores),
        "trainer_errors": dict(ledger.errors),
        "longest_s": {what: [round(s, 2), who] for what, (s, who) in ledger.longest.items()},
        "packets": {"passed": run.network.passed, "dropped": run.network.dropped},
        "usage": run.watch.summary(),
        "segment_bytes": {
            name: {"first": used[0], "most": max(used), "last": used[-1]}
            for name, used in run.watch.memory.items()
        },
        "failures": ledger.failures,
    }


def table(what: dict[str, object]) -> str:
    """The report for people."""
    lines = []
    for key, value in what.items():
        if isinstance(value, dict):
            lines += [key, *(f"  {name:40} {_short(count)}" for name, count in value.items())]
        elif isinstance(value, list):
            lines += [key, *(f"  {_short(each)}" for each in value)]
        else:
            lines.append(f"{key:42} {value}")
    return "\n".join(lines)


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
