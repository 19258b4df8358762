"""The node's front door for trainers: which socket serves my local rank?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from snapshotd.errors import RequestError
from snapshotd.flow.children import Children
from snapshotd.flow.supervisor import Supervisor
from snapshotd.rpc.checks import check_slot
from snapshotd.rpc.trainers import TrainerSocket, refused
from snapshotd.wire.points import point
from snapshotd.wire.protocol import ErrorCode
from snapshotd.wire.v1 import trainer_pb2 as pb

#: An SMP has linked by then, or is still verifying what it adopted; the trainer asks again.
READY_S = 5.0


def slot_socket_path(run_dir: Path, slot: int) -> Path:
    """The socket of a slot's SMP."""
    return run_dir / f"slot-{slot}.sock"


class FrontDesk:
    """Starts the SMP of a slot when its trainer first comes, and tells where it listens."""

    def __init__(
        self,
        socket: TrainerSocket,
        supervisor: Supervisor,
        children: Children,
        run_dir: Path,
        spawn: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self._socket = socket
        self._supervisor = supervisor
        self._children = children
        self._run_dir = run_dir
        self._spawn = spawn

    async def handle(self, identity: bytes, message: pb.ToDaemon) -> pb.ToTrainer | None:
        """One request: Find, and nothing else. Raises RequestError."""
        if message.WhichOneof("body") != "find":
            raise RequestError(
                ErrorCode.OUT_OF_ORDER, "this socket answers Find only; the SMP's does the rest"
            )
        slot = message.find.slot
        check_slot(slot)
        point("supervisor.find.heard")
        self._children.ensure(slot)
        answer = self._answer(identity, message.request, slot)
        self._spawn(asyncio.get_running_loop().create_task(answer))
        return None

    async def _answer(self, identity: bytes, request: int, slot: int) -> None:
        if await self._supervisor.slot_ready(slot, READY_S):
            endpoint = f"ipc://{slot_socket_path(self._run_dir, slot)}"
            reply = pb.ToTrainer(found=pb.Found(endpoint=endpoint))
        else:
            error = RequestError(
                ErrorCode.BUSY,
                f"the SMP of slot {slot} is not ready after {READY_S:.0f} s: "
                "it is starting, or verifying the segments it adopted",
                "Ask again; the daemon's log says more",
            )
            reply = pb.ToTrainer(refused=refused(error))
        reply.request = request
        await self._socket.send(identity, reply)
