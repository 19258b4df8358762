"""Raw ends of every socket of a daemon, for tests that say what no client of ours would."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import grpc
import zmq

from snapshotd.rpc.channels import Peer
from snapshotd.rpc.connection import Connection, HungUp, Kind, NotAFrame
from snapshotd.rpc.tls import Identity
from snapshotd.wire.protocol import FRONT_SOCKET, PROTOCOL_VERSION, SOCKETS
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import trainer_pb2 as tp
from tests.integration.cluster import Node

ANSWER_S = 10.0
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]


class Trainer:
    """A trainer's socket without a Snapshotter behind it."""

    def __init__(self, path: Path, incarnation: str = "impostor") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(f"ipc://{path}")
        self._incarnation = incarnation
        self._number = 0
        self._answers: dict[int, tp.ToTrainer] = {}  # come before they were waited for

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def say(self, **body: object) -> int:
        """Send a well-formed message; its number."""
        self._number += 1
        message = tp.ToDaemon(
            protocol=PROTOCOL_VERSION, request=self._number, incarnation=self._incarnation, **body
        )
        self.send(message.SerializeToString())
        return self._number

    def hear(self, request: int, timeout_s: float = ANSWER_S) -> tp.ToTrainer:
        """The answer to a request; what comes unasked is passed over."""
        deadline_s = time.monotonic() + timeout_s
        while request not in self._answers:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"no answer within {timeout_s} s"
            if self._socket.poll(int(left_s * 1000)):
                reply = tp.ToTrainer.FromString(self._socket.recv())
                if reply.WhichOneof("body") != "progress":
                    self._answers[reply.request] = reply
        return self._answers.pop(request)

    def ask(self, timeout_s: float = ANSWER_S, **body: object) -> tp.ToTrainer:
        return self.hear(self.say(**body), timeout_s)

    def until(self, holds: Callable[[tp.Progress], bool], timeout_s: float = ANSWER_S) -> None:
        """Back when it is told, asked or not, what makes `holds` true."""
        deadline_s = time.monotonic() + timeout_s
        self.say(query=tp.Query())
        while True:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"not told within {timeout_s} s"
            if self._socket.poll(int(left_s * 1000)):
                reply = tp.ToTrainer.FromString(self._socket.recv())
                if reply.WhichOneof("body") != "progress":
                    self._answers[reply.request] = reply
                elif holds(reply.progress):
                    return

    def refused(self, **body: object) -> tp.Refused:
        reply = self.ask(**body)
        assert reply.WhichOneof("body") == "refused", reply
        return reply.refused

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@contextmanager
def trainer(path: Path, incarnation: str = "impostor") -> Iterator[Trainer]:
    made = Trainer(path, incarnation)
    try:
        yield made
    finally:
        made.close()


def front(node: Node) -> Path:
    return node.run_dir / FRONT_SOCKET


def desk(node: Node, slot: int = 0) -> Path:
    return node.run_dir / f"slot-{slot}.sock"


def links(node: Node) -> str:
    return f"unix:{node.run_dir / 'links.sock'}"


def blocks(node: Node, slot: int = 0) -> Peer:
    """Where a slot's blocks are served, and over which plane."""
    found = next(s for s in node.status().slots if s.slot == slot)
    return Peer(node.name, found.address, found.plane)


def _plain(message: object) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


@contextmanager
def _channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        yield channel


def call(address: str, method: str, message: object, reply: type | None = None) -> object:
    """One unary call with a message or with any bytes. Raises grpc.RpcError."""
    with _channel(address) as channel:
        parse = reply.FromString if reply else None
        stub = channel.unary_unary(f"/snapshotd.wire.v1.{method}", _plain, parse)
        return stub(message, timeout=ANSWER_S)


def read(peer: Peer, message: object) -> list[pb.ReadReply]:
    """All that a Read answers. Raises grpc.RpcError."""
    if peer.plane == SOCKETS:
        with connection(peer) as raw:
            raw.send(Kind.READ, _plain(message))
            return [_reply(raw), *_replies(raw)]
    with _channel(peer.address) as channel:
        method = "/snapshotd.wire.v1.Blocks/Read"
        stub = channel.unary_stream(method, _plain, pb.ReadReply.FromString)
        return list(stub(message, timeout=ANSWER_S))


def store(peer: Peer, parts: Iterable[object], identity: Identity | None = None) -> None:
    """Send the parts of a Store. Raises grpc.RpcError."""
    if peer.plane == SOCKETS:
        _store(peer, parts, identity)
        return
    with _channel(peer.address) as channel:
        method = "/snapshotd.wire.v1.Blocks/Store"
        channel.stream_unary(method, _plain, None)(iter(parts), timeout=ANSWER_S)


class Refused(grpc.RpcError):
    """What a plane without gRPC answers, as gRPC would say it."""

    def __init__(self, text: str) -> None:
        name, _, self._details = text.partition(": ")
        self._code = getattr(grpc.StatusCode, name.upper())

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


@contextmanager
def connection(peer: Peer, identity: Identity | None = None) -> Iterator[Connection]:
    """A connection to a slot that serves its blocks over plain sockets."""
    host, _, port = peer.address.rpartition(":")
    with closing(Connection(socket.create_connection((host, int(port))), ANSWER_S)) as made:
        if identity is not None:
            made.secure(identity.dialling, server_side=False)
        yield made


def _replies(raw: Connection) -> Iterator[pb.ReadReply]:
    """Until nothing more comes for a moment."""
    while not raw.is_idle():
        yield _reply(raw)


def _reply(raw: Connection) -> pb.ReadReply | None:
    """None: the holder is ready for a block. Raises Refused."""
    try:
        kind, count = raw.head()
        body = raw.body(count)
    except (HungUp, NotAFrame) as error:
        raise Refused(f"unavailable: {error}") from error
    if kind is Kind.REFUSED:
        raise Refused(body.decode())
    if kind is Kind.CHUNK:
        return pb.ReadReply(chunk=body)
    return pb.ReadReply.FromString(body) if kind is Kind.MESSAGE else None


def _store(peer: Peer, parts: Iterable[object], identity: Identity | None) -> None:
    with connection(peer, identity) as raw:
        first = True
        for part in parts:
            with suppress(HungUp):  # it may have said why
                _say_part(raw, part)
            if first:
                _reply(raw)
            first = False
        if first:
            raw.send(Kind.GO_ON)
        with suppress(OSError), socket.socket(fileno=os.dup(raw.fileno())) as same:
            same.shutdown(socket.SHUT_WR)
        _reply(raw)


def _say_part(raw: Connection, part: object) -> None:
    if isinstance(part, pb.StoreRequest) and part.WhichOneof("part") == "chunk":
        raw.send(Kind.CHUNK, part.chunk)
    else:
        raw.send(Kind.MESSAGE, _plain(part))


def link(node: Node, parts: Iterable[object]) -> list[bytes]:
    """Play an SMP on links.sock until the supervisor ends it. Raises grpc.RpcError."""
    with _channel(links(node)) as channel:
        stub = channel.stream_stream("/snapshotd.wire.v1.Local/Link", _plain, None)
        return list(stub(iter(parts), timeout=ANSWER_S))


def refusal(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    return error.code(), error.details()
