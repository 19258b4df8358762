"""One node: a host, memory of its own, and a daemon that is started again as by systemd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from snapshotd.errors import PeerError
from snapshotd.rpc.operator import fetch_status
from snapshotd.wire.v1 import node_pb2 as pb
from tests.integration.cluster import TIMEOUTS
from tests.integration.soak import sandbox
from tests.integration.soak.ledger import Ledger
from tests.integration.soak.network import Host

PORT = 7070
MEMORY_BYTES = 24 << 20
START_S = 60.0
STOP_S = 20.0
_FILL_LEAVES_BYTES = 32 << 10


@dataclass(frozen=True)
class Plan:
    """What all nodes of a run have in common."""

    root: Path
    logs: Path
    parity: int
    group_size: int


class Node:
    """A daemon and its memory. It is started again whenever it ends, until it is to be down."""

    def __init__(
        self, name: str, host: Host, seeds: dict[str, str], plan: Plan, around: Around
    ) -> None:
        self.name, self.host, self.plan = name, host, plan
        self._around = around
        self.run_dir = plan.root / "run" / name
        self.memory = plan.root / "memory" / name
        self.log = plan.logs / f"daemon-{name}.log"
        self.config = plan.logs / f"{name}.toml"
        self.address = f"{host.address}:{PORT}"
        self.pid: int | None = None
        self.ready = asyncio.Event()
        self._wanted = asyncio.Event()
        self._fill: Path | None = None
        self.fills = 0
        self.run_dir.mkdir(parents=True)
        sandbox.mount_memory(self.memory, MEMORY_BYTES)
        self._notify = _Inbox(plan.root / "run" / f"{name}.notify", self.ready.set)
        self.config.write_text(self._toml(seeds))
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def _toml(self, seeds: dict[str, str]) -> str:
        top = {
            "cluster_id": "soak",
            "node_id": self.name,
            "listen": self.address,
            "run_dir": str(self.run_dir),
            "shm_dir": str(self.memory / "segments"),
            "memory_budget": MEMORY_BYTES,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
        lines += ["[peers]", *(f"{name} = {json.dumps(at)}" for name, at in seeds.items())]
        lines += ["[protection]", f"group_size = {self.plan.group_size}"]
        lines += [f"parity = {self.plan.parity}", "unprotected_bound_s = 5.0", "[timeouts]"]
        lines += [f"{key} = {value}" for key, value in TIMEOUTS.items()]
        return "\n".join(lines) + "\n"

    # -- life

    def start(self) -> None:
        """Have a daemon from now on."""
        self._wanted.set()

    async def up(self) -> None:
        """Wait until the daemon serves."""
        try:
            async with asyncio.timeout(START_S):
                await self.ready.wait()
        except TimeoutError:
            self._around.ledger.fail(f"{self.name} does not serve after {START_S} s")
            raise

    async def _keep(self) -> None:
        while True:
            await self._wanted.wait()
            environ = {**os.environ, "NOTIFY_SOCKET": str(self._notify.path)}
            arguments = ["-m", "snapshotd", "serve", "--config", str(self.config)]
            self.pid = sandbox.spawn(self.host.namespace, arguments, environ, self.log)
            code = await self._around.reaper.end_of(self.pid)
            self.pid = None
            self.ready.clear()
            self._around.ledger.daemon_ended(self.name, code, wanted=self._wanted.is_set())
            await asyncio.sleep(0.2)

    def smp_pids(self) -> list[int]:
        return [p.pid for p in self.smps()]

    def smps(self) -> list[psutil.Process]:
        """Orphans of an earlier supervisor, too."""
        return [p for p in psutil.process_iter() if self._is_smp(p)]

    def _is_smp(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            return "snapshotd.smp" in words and f'"{self.run_dir}"' in words[-1]
        return False

    def kill_supervisor(self) -> None:
        """SIGKILL; SMPs end by themselves, and a new daemon comes at once."""
        self._expect_kill()
        self._kill(self.pid)

    def kill_smps(self) -> None:
        for process in self.smps():
            self._kill(process.pid)

    def kill(self) -> None:
        """SIGKILL of supervisor and SMPs; nothing comes until `start`."""
        self._wanted.clear()
        self.ready.clear()
        self._expect_kill()
        pids = self.smp_pids()
        for pid in (self.pid, *pids):
            self._kill(pid)

    async def lose(self) -> None:
        """The node is gone with its memory and its disk; `start` makes it an empty one."""
        pids = self.smp_pids()
        pid = self.pid
        self.kill()
        for each in (*pids, *([pid] if pid else [])):
            await sandbox.ended(each)
        self.unfill()
        for left in self.memory.iterdir():
            shutil.rmtree(left)
        for left in self.run_dir.iterdir():
            left.unlink()

    async def stop(self) -> None:
        """SIGTERM, and a clean end."""
        self._wanted.clear()
        if self.pid is None:
            return
        end = self._around.reaper.end_of(self.pid)
        os.kill(self.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                code = await asyncio.shield(end)
        except TimeoutError:
            self._around.ledger.fail(f"{self.name} does not stop within {STOP_S} s of SIGTERM")
            self.kill()
            return
        if code != 0:
            self._around.ledger.fail(f"{self.name} ended with {code} after SIGTERM")

    async def remove(self) -> None:
        """Nothing of it is left; its daemon does not run any more."""
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        self.ready.set()  # whoever waits for it looks for another one
        self._notify.close()
        self.unfill()
        sandbox.unmount(self.memory)
        shutil.rmtree(self.run_dir)

    def _kill(self, pid: int | None) -> None:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _expect_kill(self) -> None:
        if self.pid is not None:
            self._around.ledger.daemon_struck(self.name)

    # -- memory and status

    def fill(self) -> None:
        """Take up the node's memory, but for a few pages."""
        self.fills += 1
        if self._fill is None:
            stat = os.statvfs(self.memory)
            take = stat.f_bavail * stat.f_frsize - _FILL_LEAVES_BYTES
            self._fill = self.memory / "fill"
            with self._fill.open("wb") as file:
                if take > 0:
                    os.posix_fallocate(file.fileno(), 0, take)

    def unfill(self) -> None:
        if self._fill is not None:
            self._fill.unlink(missing_ok=True)
            self._fill = None

    async def status(self) -> pb.NodeStatus | None:
        """None where it does not answer."""
        with contextlib.suppress(PeerError):
            return await asyncio.to_thread(fetch_status, self.address, 5.0)
        return None


@dataclass
class Around:
    """What every node needs of the run."""

    reaper: sandbox.Reaper
    ledger: Ledger


class _Inbox:
    """Where a daemon says that it serves, as it does to systemd."""

    def __init__(self, path: Path, on_ready) -> None:
        self.path = path
        self._on_ready = on_ready
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    def _read(self) -> None:
        if b"READY=1" in self._socket.recv(65536).split(b"\n"):
            self._on_ready()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self.path.unlink()
