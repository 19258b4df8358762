"""The composition root of an SMP, and its program: `python -m snapshotd.smp SETTINGS`.

Started by the supervisor, one a slot. It ends when its supervisor does; its segments stay.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import zmq.asyncio

from snapshotd.coding.choice import choose_codec
from snapshotd.core.persist import Schedule
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import PeerError, SnapshotdError
from snapshotd.flow.coder import Coder
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.desk import TrainerDesk
from snapshotd.flow.front import slot_socket_path
from snapshotd.flow.intake import Intake
from snapshotd.flow.lending import Lending
from snapshotd.flow.persist import Persister, TierSettings
from snapshotd.flow.priority import Priority
from snapshotd.flow.ranges import Gatherer
from snapshotd.flow.scrub import Scrub
from snapshotd.flow.smp import Smp
from snapshotd.flow.transfer import Transfers
from snapshotd.flow.vault import Vault
from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.memory.heap import keep_freed
from snapshotd.memory.locks import trainer_holding
from snapshotd.memory.rooms import Rooms
from snapshotd.metadata import Home
from snapshotd.rpc.block_service import BlocksServer
from snapshotd.rpc.local import Link
from snapshotd.rpc.serving import Serving
from snapshotd.rpc.socket_client import PlanesClient
from snapshotd.rpc.socket_service import SocketsServer
from snapshotd.rpc.streaming import Bandwidth
from snapshotd.rpc.tls import Identity, TlsFiles
from snapshotd.rpc.trainers import TrainerSocket
from snapshotd.telemetry.logs import configure
from snapshotd.wire.points import point
from snapshotd.wire.protocol import GRPC, SOCKETS, trainer_lock_name

if TYPE_CHECKING:
    from snapshotd.config import CodecName, Config, LogFormat, LogLevel, PlaneName

log = logging.getLogger(__name__)

#: Name of the supervisor's socket for its SMPs, inside the run directory.
LINKS_SOCKET: Final = "links.sock"
#: What serves blocks, by plane.
SERVERS: Final[Mapping[str, type[BlocksServer | SocketsServer]]] = {
    GRPC: BlocksServer,
    SOCKETS: SocketsServer,
}


@dataclass(frozen=True)
class SmpSettings:
    """What a supervisor tells an SMP on its command line.

    It is checked already; so the SMP does without the modules that check, and their memory.
    """

    cluster_id: str
    node_id: str
    slot: int
    host: str
    run_dir: Path
    shm_dir: Path
    budget_bytes: int
    generations: int
    group_size: int
    parity: int
    coding: CodecName
    plane: PlaneName
    scrub_bytes_per_s: int
    nice: int
    cpus: str
    bytes_per_s: int
    stall_s: float
    tls: TlsFiles | None
    tier: TierSettings | None
    log_level: LogLevel
    log_format: LogFormat

    @classmethod
    def of(cls, config: Config, slot: int, tls: TlsFiles | None) -> Self:
        return cls(
            cluster_id=config.cluster_id,
            node_id=config.node_id,
            slot=slot,
            host=config.listen.rpartition(":")[0],
            run_dir=config.run_dir,
            shm_dir=config.shm_dir,
            budget_bytes=int(config.memory_budget),
            generations=config.generations,
            group_size=config.protection.group_size,
            parity=config.protection.parity,
            coding=config.protection.coding,
            plane=config.protection.plane,
            scrub_bytes_per_s=int(config.protection.scrub_bytes_per_s),
            nice=config.background.nice,
            cpus=config.background.cpus,
            bytes_per_s=int(config.background.bytes_per_s),
            stall_s=config.timeouts.rpc_s,
            tls=tls,
            tier=tier_settings(config),
            log_level=config.log_level,
            log_format=config.log_format,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        paths = {name: Path(values[name]) for name in ("run_dir", "shm_dir")}
        tls = values["tls"] and TlsFiles(**{k: Path(v) for k, v in values["tls"].items()})
        tier = values["tier"] and TierSettings(
            **{**values["tier"], "schedule": Schedule(**values["tier"]["schedule"])}
        )
        return cls(**{**values, **paths, "tls": tls, "tier": tier})


def tier_settings(config: Config) -> TierSettings | None:
    """What an SMP must know of the persistent tier; None where none is configured."""
    keys = config.persist
    if not keys.url:
        return None
    schedule = Schedule(keys.interval_s, keys.every_steps, keys.keep_last, keys.keep_every_nth)
    return TierSettings(keys.url, int(keys.bytes_per_s), schedule)


async def run(settings: SmpSettings, priority: Priority) -> None:
    """Adopt, link, serve; until SIGTERM, or until the supervisor is gone."""
    point("smp.start.begun")
    coding = choose_codec(settings.coding)
    if coding.note:
        log.warning("slot %d: %s", settings.slot, coding.note)
    log.info("slot %d: the code is computed by %s", settings.slot, coding.codec.name)
    home = Home(settings.node_id, settings.slot)
    budget = Budget(settings.shm_dir, settings.budget_bytes)
    arena = Arena(settings.shm_dir / f"slot-{settings.slot}", budget)
    machine = SlotMachine(home, settings.generations)
    vault = Vault(
        arena, machine, settings.cluster_id, settings.generations * max(1, settings.parity)
    )
    conduct = Conduct()
    intake = Intake(vault, machine, conduct)
    # Adopted before anything can ask: nothing unverified is ever served.
    await vault.adopt()
    point("smp.adopt.done")
    cluster_id, identity = settings.cluster_id, _identity(settings)
    bandwidth = Bandwidth(settings.bytes_per_s, settings.stall_s)
    client = PlanesClient(
        identity, cluster_id, home, settings.stall_s, vault.received, vault.sent, bandwidth
    )
    lock = settings.run_dir / trainer_lock_name(settings.slot)
    link = Link(settings.run_dir / LINKS_SOCKET)

    rooms = Rooms(budget, arena, settings.generations, settings.group_size, settings.parity)
    persister = _persister(settings, machine, vault)
    tools = home, vault, client, coding.codec, conduct
    smp = Smp(
        machine, vault, Coder(*tools), Transfers(*tools), link, lock, rooms, conduct, persister
    )
    smp.lending = Lending(
        machine,
        vault,
        Gatherer(*tools, smp.reachable),
        persister.stored if persister else None,
    )
    server = SERVERS[settings.plane](
        Serving(vault, intake, cluster_id, settings.stall_s, identity, bandwidth)
    )
    smp.plane = settings.plane
    smp.address = f"{settings.host}:{await server.start(settings.host)}"
    context = zmq.asyncio.Context()
    socket = TrainerSocket(context, slot_socket_path(settings.run_dir, settings.slot))

    smp.desk = TrainerDesk(
        smp, socket, settings.cluster_id, rooms.check_begin, lambda: trainer_holding(lock),
        priority.beside,
    )  # fmt: skip
    socket.bind()
    point("smp.start.bound")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: None)
    tasks = [
        asyncio.create_task(work)
        for work in (
            link.run(smp.follow),
            smp.run(),
            socket.serve(smp.desk.handle),
            socket.disconnections(smp.check_trainer),
            Scrub(vault, settings.scrub_bytes_per_s).run(),
            _until(stop),
        )
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        point("smp.stop.begun")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await smp.stop()
        await server.stop()
        await client.close()
        socket.close()
        context.term()


def _identity(settings: SmpSettings) -> Identity | None:
    if settings.tls is None:
        return None
    return Identity.load(settings.tls, settings.cluster_id, settings.node_id)


def _persister(settings: SmpSettings, machine: SlotMachine, vault: Vault) -> Persister | None:
    if settings.tier is None:
        return None
    return Persister(machine, vault, settings.tier, settings.generations)


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


def main(argv: list[str] | None = None) -> int:
    """Entry point of the SMP program."""
    (text,) = sys.argv[1:] if argv is None else argv
    settings = SmpSettings.from_json(text)
    configure(settings.log_level, settings.log_format, settings.node_id)
    keep_freed()
    gc.freeze()  # what is imported stays: nobody need look through it again and again
    try:
        asyncio.run(run(settings, Priority(settings.nice, settings.cpus)))
    except PeerError as error:
        log.info("slot %d ends: %s", settings.slot, error)
    except SnapshotdError as error:
        log.error("slot %d cannot be served: %s", settings.slot, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
