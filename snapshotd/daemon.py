"""The composition root of the supervisor, and its program: everything is made here, in order.

Nothing else constructs a service. `serve` reads as the life of the daemon: take the
directories, start up, run until told to stop or until something fails for good, shut down.
The command `snapshotd serve` becomes `python -m snapshotd.daemon NODE FD`: the node's name for
whoever lists processes, and a descriptor to read the checked configuration from.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import zmq.asyncio

from snapshotd import settled
from snapshotd.coding.choice import choose_codec
from snapshotd.core.board import Board, Policy
from snapshotd.core.membership import Membership, Refusal
from snapshotd.errors import ConfigError, SnapshotdError, exit_code
from snapshotd.flow.children import Children
from snapshotd.flow.front import FrontDesk, slot_socket_path
from snapshotd.flow.lookout import Lookout
from snapshotd.flow.records import Records
from snapshotd.flow.status import Clock, exposure, node_status, plan_reply
from snapshotd.flow.supervisor import Pace, Supervisor
from snapshotd.memory.budget import Budget
from snapshotd.memory.locks import DirectoryLock
from snapshotd.memory.oom import settle
from snapshotd.memory.preflight import beyond, measure_limits
from snapshotd.metadata import NodeFacts
from snapshotd.rpc.channels import CONTROL_OPTIONS, Channels
from snapshotd.rpc.checks import MAX_SLOTS
from snapshotd.rpc.local import LocalServer
from snapshotd.rpc.node import NodeServer
from snapshotd.rpc.tls import Identity, TlsFiles
from snapshotd.rpc.trainers import MAX_SOCKET_PATH_BYTES, TrainerSocket
from snapshotd.smp import LINKS_SOCKET, SmpSettings
from snapshotd.telemetry.logs import configure
from snapshotd.telemetry.notify import Notifier, watchdog_interval_s
from snapshotd.wire.address import is_loopback
from snapshotd.wire.points import point
from snapshotd.wire.protocol import FRONT_SOCKET, TLS_FILE
from snapshotd.wire.v1 import node_pb2 as pb

if TYPE_CHECKING:
    from snapshotd.config import Config

log = logging.getLogger(__name__)

STOP_GRACE_S = 2.0


def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT.

    Raises:
        SnapshotdError: it cannot start, or must not go on.
    """
    _check_sockets(config.run_dir)
    settle(config.oom_score_adj)  # first: SMPs inherit it
    with _owned(config.run_dir, "run_dir"), _owned(config.shm_dir, "shm_dir"):
        point("supervisor.start.owned")
        asyncio.run(Node(config).run())


def _check_sockets(run_dir: Path) -> None:
    """All names that will be bound there must fit in a socket's address."""
    paths = (
        run_dir / FRONT_SOCKET,
        run_dir / LINKS_SOCKET,
        slot_socket_path(run_dir, MAX_SLOTS - 1),
    )
    longest = max(len(os.fsencode(path)) for path in paths)
    if longest > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"run_dir {run_dir} makes socket paths of {longest} bytes, the system's limit is "
            f"{MAX_SOCKET_PATH_BYTES}",
            f"Choose a run_dir that is {longest - MAX_SOCKET_PATH_BYTES} byte(s) shorter",
        )


@contextlib.contextmanager
def _owned(directory: Path, key: str) -> Iterator[None]:
    """Make a directory, and keep every other daemon out of it."""
    lock = DirectoryLock(directory)
    try:
        directory.mkdir(parents=key == "run_dir", exist_ok=True, mode=0o770)
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"{key} {directory} cannot be used: {error.strerror}",
            f"Set {key} to a directory that this user can make and write"
            + (", on a tmpfs that is mounted" if key == "shm_dir" else ""),
        ) from error
    try:
        yield
    finally:
        lock.release()


class Node:
    """One running daemon: the parts, and the few things that concern all of them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._tls = TlsFiles.of(config.tls)
        self._identity = (
            Identity.load(self._tls, config.cluster_id, config.node_id) if self._tls else None
        )
        self._records = Records(config.state_dir)
        self._board = _board(config, self._records)
        point("supervisor.records.loaded")
        self._clock = Clock()
        self._budget = Budget(config.shm_dir, int(config.memory_budget))
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] | None = None
        self._health: bool | None = None
        self._notifier = Notifier.from_environ(os.environ)
        coding = choose_codec(config.protection.coding)
        self._coding = coding.codec.name
        limits = measure_limits(config.shm_dir)
        self._notes = [*beyond(int(config.memory_budget), limits), *filter(None, [coding.note])]
        if self._identity is None and not is_loopback(config.listen):
            self._notes.append(
                f"whoever reaches {config.listen} can read this node's snapshots and speak in "
                "another node's name: set [tls]"
            )
        for note in self._notes:
            log.warning("%s", note)

    # -- what the node service asks

    def hear(self, facts: NodeFacts) -> Refusal | None:
        return self._supervisor.asked(facts)

    def facts(self) -> NodeFacts:
        return self._board.facts

    def status(self) -> pb.NodeStatus:
        now_s = time.monotonic()
        self._board.conclude(now_s)
        status = node_status(self._board, self._clock, now_s)
        status.budget_bytes = self._budget.limit_bytes
        status.allocated_bytes = self._budget.used_bytes()
        status.coding = self._coding
        status.health_reason = self._unhealthy(now_s)
        status.healthy = not status.health_reason
        status.notes.extend(self._notes)
        return status

    def plan(self, job: str) -> pb.PlanReply:
        return plan_reply(self._board, job, time.monotonic())

    def drop(self, job: str) -> int:
        return self._supervisor.drop(job)

    # -- life

    async def run(self) -> None:
        """Start up, serve, and stop in reverse what was started, however far it came."""
        stop = asyncio.Event()
        self._failed = asyncio.get_running_loop().create_future()
        with _signals(stop):
            async with contextlib.AsyncExitStack() as parts:
                await self._start(parts)
                await self._main_loop(stop)
                self._supervisor.leave()
                point("supervisor.stop.begun")
                self._notifier.stopping()
        log.info("%s has stopped; its segments stay", self._config.node_id)

    async def _start(self, parts: contextlib.AsyncExitStack) -> None:
        config = self._config
        channels = Channels(self._identity, CONTROL_OPTIONS)
        bounds = config.timeouts
        pace = Pace(bounds.heartbeat_s, bounds.rpc_s, bounds.dead_s)
        self._supervisor = Supervisor(self._board, channels, self._records, pace)
        parts.push_async_callback(self._supervisor.stop)
        # The links must be there before the first SMP looks for them.
        links, socket = LocalServer(self._supervisor), config.run_dir / LINKS_SOCKET
        await links.start(socket)
        point("supervisor.links.open")
        parts.callback(socket.unlink, missing_ok=True)
        parts.push_async_callback(links.stop)
        self._lookout = Lookout(config.persist.url, self._supervisor.tier_seen, self._watch)
        self._children = children = Children(self._smp_arguments)
        parts.push_async_callback(children.stop)
        # The board must know which slots may hold something before the port opens: a peer that
        # heard of none might decide without them.
        adopting = _slots_with_segments(config.shm_dir)
        for slot in adopting:
            self._supervisor.starting(slot)
        self._server = NodeServer(self, self._identity, self._supervisor.tellings)
        parts.push_async_callback(self._server.stop, STOP_GRACE_S)
        await self._server.start(config.listen)
        point("supervisor.port.open")
        self._supervisor.start()
        for slot in adopting:
            children.ensure(slot)
        self._supervisor.on_change = self._on_change
        # Trainers come last: all that they may ask for is there.
        context = zmq.asyncio.Context()
        parts.callback(context.term)
        front = TrainerSocket(context, config.run_dir / FRONT_SOCKET)
        parts.callback(front.close)
        front.bind()
        point("supervisor.front.open")
        parts.push_async_callback(self._end_tasks)
        desk = FrontDesk(front, self._supervisor, children, config.run_dir, self._watch)
        self._watch(asyncio.get_running_loop().create_task(front.serve(desk.handle)))
        self._watch(asyncio.get_running_loop().create_task(self._keep_time()))
        address = config.run_dir / "address"
        parts.callback(address.unlink, missing_ok=True)
        _replace_text(address, config.listen)
        if self._tls:
            self._lend(self._tls, parts)
        point("supervisor.start.done")
        self._notifier.ready(self._standing(""))
        log.info(
            "%s of cluster %s serves on %s%s; the code is computed by %s",
            config.node_id,
            config.cluster_id,
            config.listen,
            " with TLS" if self._tls else "",
            self._coding,
        )

    def _lend(self, files: TlsFiles, parts: contextlib.AsyncExitStack) -> None:
        """Tell commands on this node which certificate to show; they need the right to read it."""
        path = self._config.run_dir / TLS_FILE
        parts.callback(path.unlink, missing_ok=True)
        told = {**asdict(files), "cluster_id": self._config.cluster_id}
        _replace_text(path, json.dumps(told, default=str))

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _main_loop(self, stop: asyncio.Event) -> None:
        """Until told to stop; a task that ends with an error ends the daemon with it."""
        assert self._failed is not None
        self._failed.add_done_callback(lambda _: stop.set())
        await stop.wait()
        if self._failed.done():
            self._failed.result()

    # -- parts

    def _watch(self, task: asyncio.Task[None]) -> None:
        """Keep a task, and let the daemon end with it if it fails."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        assert self._failed is not None
        if not self._failed.done():
            self._failed.set_exception(task.exception() or AssertionError)

    def _on_change(self) -> None:
        now_s = time.monotonic()
        self._clock.watch(self._board, now_s)
        self._lookout.pursue(self._board.tier_wanted(now_s))
        for slot in self._board.slots_needed():
            self._children.ensure(slot)
        for task in self._supervisor.loops:
            if task.done():
                self._ended(task)

    async def _keep_time(self) -> None:
        """What only time brings: deaths, health, the watchdog."""
        interval_s = self._config.timeouts.heartbeat_s
        watchdog_s = watchdog_interval_s(os.environ, os.getpid())
        limit_s = min(interval_s, watchdog_s) if watchdog_s else interval_s
        while True:
            now_s = time.monotonic()
            self._supervisor.tick(now_s)
            await self._set_health(self._unhealthy(now_s))
            self._notifier.watchdog()
            await self._supervisor.rest(limit_s)

    async def _set_health(self, reason: str) -> None:
        healthy = not reason
        if healthy != self._health:
            self._health = healthy
            await self._server.set_health(serving=healthy)
            self._notifier.status(self._standing(reason))
            log.log(
                logging.INFO if healthy else logging.ERROR,
                "health: %s",
                "serving" if healthy else reason,
            )

    def _standing(self, reason: str) -> str:
        """The line that the service manager shows."""
        serves = f"{self._config.node_id} serves on {self._config.listen}"
        return f"{serves}; NOT HEALTHY: {reason}" if reason else serves

    def _unhealthy(self, now_s: float) -> str:
        """Why this node's state is in danger; empty while it is not."""
        since_s = self._clock.unprotected_since_s
        bound_s = self._config.protection.unprotected_bound_s
        if since_s is None or now_s - since_s < bound_s:
            return ""
        reasons = [
            f"slot {exposed.slot} of job {exposed.job!r} has been unprotected for "
            f"{now_s - since_s:.0f} s: {exposed.why}"
            for exposed in exposure(self._board, now_s)
            if exposed.why
        ]
        return "; ".join(reasons)

    def _smp_arguments(self, slot: int) -> tuple[str, ...]:
        settings = SmpSettings.of(self._config, slot, self._tls)
        return ("-m", "snapshotd.smp", settings.to_json())


def _board(config: Config, records: Records) -> Board:
    membership = Membership(
        cluster_id=config.cluster_id,
        node=config.node_id,
        boot=f"{time.time_ns():020d}-{os.getpid()}",
        address=config.listen,
        seeds=config.peers,
        suspect_s=config.timeouts.suspect_s,
        dead_s=config.timeouts.dead_s,
        started_s=time.monotonic(),
    )
    policy = Policy(
        group_size=config.protection.group_size,
        parity=config.protection.parity,
        patience_s=config.timeouts.restore_s / 2,
        max_interval=config.protection.max_interval,
        replace_s=config.timeouts.replace_s,
        epoch_floor=int(time.time()),
        tier=config.persist.url,
    )
    return Board(membership, policy, records.load())


def _slots_with_segments(shm_dir: Path) -> list[int]:
    names = (path.parent.name.removeprefix("slot-") for path in shm_dir.glob("slot-*/*.seg"))
    return sorted({int(name) for name in names if name.isdigit()})


def _replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, whole."""
    half = path.with_suffix(".half")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """Borrow SIGTERM and SIGINT, and give them back."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def main() -> int:
    """Entry point of the daemon's program.

    Returns:
        The exit status, as that of the command that it took over from.
    """
    with open(int(sys.argv[2]), encoding="utf-8") as handed:
        config = settled.from_text(handed.read())
    configure(config.log_level, config.log_format, config.node_id)
    try:
        serve(config)
    except SnapshotdError as error:
        sys.stderr.write(f"snapshotd: {error}\n")
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
