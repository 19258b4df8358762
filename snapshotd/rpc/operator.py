"""Calls that an operator's command makes to a running daemon; plain and blocking."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from snapshotd.errors import PeerError
from snapshotd.rpc.channels import OPTIONS, named
from snapshotd.rpc.tls import Identity, meaning
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import node_pb2_grpc


def fetch_status(address: str, timeout_s: float, identity: Identity | None = None) -> pb.NodeStatus:
    """Status of the daemon at host:port. Raises PeerError."""
    with _node(address, identity) as stub:
        reply: pb.NodeStatus = stub.Status(pb.StatusRequest(), timeout=timeout_s)
        return reply


def fetch_plan(
    address: str, job: str, timeout_s: float, identity: Identity | None = None
) -> pb.PlanReply:
    """What a restore of `job` would do now. Raises PeerError."""
    with _node(address, identity) as stub:
        reply: pb.PlanReply = stub.Plan(pb.PlanRequest(job=job), timeout=timeout_s)
        return reply


def fetch_facts(address: str, timeout_s: float, identity: Identity | None = None) -> pb.NodeFacts:
    """What one node publishes. Raises PeerError."""
    with _node(address, identity) as stub:
        reply: pb.NodeFacts = stub.Inventory(pb.InventoryRequest(), timeout=timeout_s)
        return reply


def drop(
    address: str, job: str, timeout_s: float, identity: Identity | None = None
) -> pb.DropReply:
    """Forget a job and free its memory on all nodes. Raises PeerError."""
    with _node(address, identity) as stub:
        reply: pb.DropReply = stub.Drop(pb.DropRequest(job=job), timeout=timeout_s)
        return reply


@contextmanager
def _node(address: str, identity: Identity | None) -> Iterator[node_pb2_grpc.NodeStub]:
    name = identity.name_of(None) if identity else None
    with _dialled(address, identity) as channel:
        try:
            yield node_pb2_grpc.NodeStub(channel)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            means = meaning(details or "", name)
            if means:
                raise PeerError(
                    f"no trust between this command and {address}: {means}",
                    "Name the configuration of a daemon of its cluster by --config, or its run "
                    "directory by --run-dir",
                ) from error
            if code == grpc.StatusCode.UNAVAILABLE:
                raise PeerError(
                    f"no daemon answers at {address} ({details})",
                    "Start one with `snapshotd serve`, or name another with --address",
                ) from error
            raise PeerError(f"{address}: {details}") from error


def _dialled(address: str, identity: Identity | None) -> grpc.Channel:
    if identity is None:
        return grpc.insecure_channel(address, options=OPTIONS)
    options: Any = (*OPTIONS, named(identity.name_of(None)))
    return grpc.secure_channel(address, identity.channel(), options=options)
