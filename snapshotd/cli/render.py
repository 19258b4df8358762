"""How messages look to an operator: tables for people, JSON for programs. No input, no output."""

from __future__ import annotations

import json
from collections.abc import Iterator

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from snapshotd.cli.units import in_bytes
from snapshotd.wire.v1.node_pb2 import (
    GenerationStatus,
    GroupStatus,
    JobFacts,
    MemberStatus,
    NodeStatus,
    PersistFacts,
    PlanReply,
    ShardStatus,
    SlotFacts,
)
from snapshotd.wire.v1.segment_pb2 import Version


def message_json(message: Message) -> str:
    """A message in protobuf's JSON mapping: 64-bit integers are strings, bytes are base64."""
    tree = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return json.dumps(tree, indent=2)


def status_tables(status: NodeStatus) -> Iterator[RenderableType]:
    """Health and memory, then members, shards and jobs."""
    yield _node_summary(status)
    tables = (_members, _shards, _groups, _jobs, _slots, _persistent)
    for table in (make(status) for make in tables):
        yield table if table.row_count else f"no {table.title}"


def plan_tables(plan: PlanReply) -> Iterator[RenderableType]:
    """The verdict, then where each shard would come from."""
    if plan.restorable:
        saved = f"{_version(plan.version)}, saved by {plan.world} ranks"
        yield f"{escape(plan.job)} would resume from {saved}"
    else:
        yield f"{escape(plan.job)} cannot be restored: {escape(plan.reason)}"
    if not plan.shards:
        return
    table = _table("shards", "shard", "source", "detail")
    for shard in plan.shards:
        table.add_row(str(shard.shard), shard.source, escape(shard.detail))
    yield table


def _node_summary(status: NodeStatus) -> RenderableType:
    health = "healthy" if status.healthy else f"NOT HEALTHY: {escape(status.health_reason)}"
    grid = Table.grid(padding=(0, 2))
    grid.add_row("node", f"{escape(status.node)} of {escape(status.cluster_id)}")
    grid.add_row("health", health)
    for note in status.notes:
        grid.add_row("note", escape(note))
    grid.add_row("memory", _memory(status))
    grid.add_row("coordinator", escape(status.coordinator) or "none")
    grid.add_row("daemon", f"{status.version}, code by {status.coding}, boot {status.boot}")
    return grid


def _memory(status: NodeStatus) -> str:
    used, budget = status.allocated_bytes, status.budget_bytes
    share = f" ({100 * used / budget:.0f} %)" if budget else ""
    return f"{in_bytes(used)} of {in_bytes(budget)}{share}"


def _members(status: NodeStatus) -> Table:
    table = _table("members", "node", "address", "state", "silent", "why")
    member: MemberStatus
    for member in status.members:
        silent = f"{member.silent_s:.1f} s"
        table.add_row(
            escape(member.node), member.address, member.state, silent, escape(member.reason)
        )
    return table


def _shards(status: NodeStatus) -> Table:
    table = _table("shards", "job", "shard", "home", "generations", "protected", "waits for")
    shard: ShardStatus
    for shard in status.shards:
        table.add_row(
            escape(shard.job),
            str(shard.shard),
            f"{shard.home.node}/{shard.home.slot}",
            "\n".join(map(_generation, shard.generations)) or "none",
            "yes" if shard.is_protected else f"no: {escape(shard.why_not)}",
            escape(", ".join(shard.waits_for)),
        )
    return table


def _generation(generation: GenerationStatus) -> str:
    return (
        f"{_version(generation.version)} {generation.state}, "
        f"{generation.age_s:.1f} s old, {in_bytes(generation.bytes)}"
    )


def _groups(status: NodeStatus) -> Table:
    table = _table("groups", "job", "shards", "kept on", "survives", "why")
    group: GroupStatus
    for group in status.groups:
        table.add_row(
            escape(group.job),
            ", ".join(map(str, group.shards)),
            ", ".join(f"{home.node}/{home.slot}" for home in group.homes),
            _survives(group),
            escape(group.why),
        )
    return table


def _survives(group: GroupStatus) -> str:
    if group.further_losses < 0:
        return "LOST: not all of it can be had now"
    nodes = "node" if group.further_losses == 1 else "nodes"
    short = group.further_losses < group.parity
    return f"{group.further_losses} {nodes}" + (f" of {group.parity}" if short else "")


def _jobs(status: NodeStatus) -> Table:
    table = _table("jobs", "job", "ranks", "epoch", "restore point", "snapshot every")
    job: JobFacts
    for job in status.jobs:
        table.add_row(
            escape(job.job),
            str(job.world),
            str(job.epoch),
            _restore_point(job),
            _cadence(job),
        )
    return table


def _restore_point(job: JobFacts) -> str:
    if job.HasField("committed"):
        return _version(job.committed)
    # Every decision has a world; only a drop leaves a job without one.
    return "none yet" if job.world else "dropped"


def _cadence(job: JobFacts) -> str:
    if job.cadence.interval <= 1:
        return "interval asked for"
    return f"{job.cadence.interval} times that interval, from step {job.cadence.from_step}"


def _slots(status: NodeStatus) -> Table:
    table = _table(
        "slots", "slot", "trainer", "segments", "sent", "received", "quarantined", "repeated"
    )
    slot: SlotFacts
    for slot in status.slots:
        counters = slot.counters
        table.add_row(
            str(slot.slot),
            _trainer(slot),
            in_bytes(counters.allocated_bytes),
            in_bytes(counters.bytes_sent),
            in_bytes(counters.bytes_received),
            str(counters.quarantined),
            str(counters.repeated_total),
        )
    return table


def _persistent(status: NodeStatus) -> Table:
    table = _table(
        "persistent tier", "slot", "job", "newest whole", "written here", "now", "what hinders"
    )
    for slot in status.slots:
        told: PersistFacts
        for told in slot.persist:
            table.add_row(
                str(slot.slot),
                escape(told.job),
                _version(told.published) if told.HasField("published") else "",
                _version(told.written) if told.HasField("written") else "",
                _written(told),
                escape(told.error),
            )
    return table


def _written(told: PersistFacts) -> str:
    """How far this slot's shard is: written, then read back."""
    if not told.bytes_total or told.bytes_done >= told.bytes_total:
        return "idle"
    half = told.bytes_total // 2
    doing = "writing" if told.bytes_done < half else "reading back"
    return f"{doing}, {100 * told.bytes_done // told.bytes_total} % of {in_bytes(half)} twice"


def _trainer(slot: SlotFacts) -> str:
    if not slot.HasField("trainer"):
        return "none"
    trainer = slot.trainer
    life = "" if trainer.present else ", gone"
    return f"rank {trainer.shard} of {trainer.world}, {escape(trainer.job)}{life}"


def _version(version: Version) -> str:
    return f"step {version.step} (epoch {version.epoch})"


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
