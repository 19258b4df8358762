"""What slots, jobs and nodes say of themselves, to messages and back; see `convert`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snapshotd.core.trust import LAST_PAUSE_S, MAX_ACCUSED
from snapshotd.metadata import (
    Accusation,
    Cadence,
    DataHolding,
    Decision,
    Economy,
    Home,
    JobFacts,
    NodeFacts,
    Orders,
    ParityHolding,
    PersistFacts,
    SlotCounters,
    SlotFacts,
    TrainerFacts,
    Unsealed,
    Vow,
)
from snapshotd.rpc.checks import (
    MAX_HOLDINGS,
    MAX_NODES,
    MAX_SLOTS,
    MAX_WORLD,
    check_digest,
    check_job,
    check_name,
    check_peer_address,
    check_rank,
    check_slot,
    checked_count,
    checked_epoch,
    checked_size,
    malformed,
)
from snapshotd.rpc.convert import (
    decision_from,
    decision_id_from,
    decision_id_to,
    decision_to,
    group_from,
    group_to,
    place_from,
    place_to,
    version_from,
    version_to,
)
from snapshotd.wire.protocol import GRPC, MAX_JOBS
from snapshotd.wire.v1 import node_pb2 as pb


def data_to(d: DataHolding) -> pb.DataHolding:
    return pb.DataHolding(
        job=d.job,
        shard=d.shard,
        version=version_to(d.version),
        image_bytes=d.image_bytes,
        content_digest=d.content_digest,
        world=d.world,
    )


def _data_from(m: pb.DataHolding) -> DataHolding:
    check_job(m.job)
    check_digest(m.content_digest)
    size = checked_size(m.image_bytes)
    world = _world_of(m)
    return DataHolding(m.job, m.shard, version_from(m.version), size, m.content_digest, world)


def _unsealed_to(u: Unsealed) -> pb.Unsealed:
    return pb.Unsealed(
        job=u.job, shard=u.shard, version=version_to(u.version), image_bytes=u.image_bytes
    )


def _unsealed_from(m: pb.Unsealed) -> Unsealed:
    check_job(m.job)
    return Unsealed(m.job, m.shard, version_from(m.version), checked_size(m.image_bytes))


def _world_of(m: pb.DataHolding | pb.ParityHolding) -> int:
    if m.world > MAX_WORLD:
        raise malformed(f"what {m.world} ranks saved, at most {MAX_WORLD} expected")
    return m.world


def parity_to(p: ParityHolding) -> pb.ParityHolding:
    return pb.ParityHolding(
        job=p.job,
        version=version_to(p.version),
        place=place_to(p.place),
        image_bytes=p.image_bytes,
        content_digests=p.content_digests,
        shard_bytes=p.shard_bytes,
        world=p.world,
    )


def _parity_from(m: pb.ParityHolding) -> ParityHolding:
    check_job(m.job)
    place = place_from(m.place)
    if not len(m.content_digests) == len(m.shard_bytes) == len(place.shards):
        raise malformed("a parity block does not describe each shard of its group")
    for digest in m.content_digests:
        check_digest(digest)
    return ParityHolding(
        m.job,
        version_from(m.version),
        place,
        checked_size(m.image_bytes),
        tuple(m.content_digests),
        tuple(checked_size(count) for count in m.shard_bytes),
        _world_of(m),
    )


def trainer_to(t: TrainerFacts) -> pb.TrainerFacts:
    return pb.TrainerFacts(
        job=t.job,
        run_id=t.run_id,
        restart_count=t.restart_count,
        incarnation=t.incarnation,
        shard=t.shard,
        world=t.world,
        waiting=t.waiting,
        allow_fresh=t.allow_fresh,
        decision=decision_id_to(t.decision) if t.decision else None,
        staged=t.staged,
        failure=t.failure,
        passed_step=t.passed_step,
        skipped=t.skipped,
        present=t.present,
        launch=t.launch,
        reshard=t.reshard,
        damaged=t.damaged,
    )


def _trainer_from(m: pb.TrainerFacts) -> TrainerFacts:
    check_job(m.job)
    check_rank(m.shard, m.world)
    check_name("an incarnation", m.incarnation)
    check_name("a run id", m.run_id)
    check_name("a launch", m.launch, 0)
    return TrainerFacts(
        job=m.job,
        run_id=m.run_id,
        restart_count=m.restart_count,
        incarnation=m.incarnation,
        shard=m.shard,
        world=m.world,
        waiting=m.waiting,
        allow_fresh=m.allow_fresh,
        decision=decision_id_from(m.decision) if m.HasField("decision") else None,
        staged=m.staged,
        failure=m.failure,
        passed_step=checked_count(m.passed_step),
        skipped=m.skipped,
        present=m.present,
        launch=m.launch,
        reshard=m.reshard,
        damaged=m.damaged,
    )


_COUNTERS = tuple(SlotCounters.__dataclass_fields__)


def _accusation_to(a: Accusation) -> pb.Accusation:
    return pb.Accusation(node=a.node, what=a.what, count=a.count, cut_off_s=a.cut_off_s)


def _accusation_from(m: pb.Accusation) -> Accusation:
    check_name("an accused node's id", m.node)
    check_name("what it is accused of", m.what)
    if not 0 <= m.cut_off_s <= LAST_PAUSE_S:
        raise malformed(f"node {m.node!r} is cut off for {m.cut_off_s} s")
    return Accusation(m.node, m.what, m.count, m.cut_off_s)


def _vow_to(v: Vow) -> pb.Vow:
    staged = decision_id_to(v.staged) if v.staged else None
    return pb.Vow(job=v.job, since=v.since, staged=staged)


def _vow_from(m: pb.Vow) -> Vow:
    check_job(m.job)
    staged = decision_id_from(m.staged) if m.HasField("staged") else None
    return Vow(m.job, checked_epoch(m.since), staged)


def _persist_to(p: PersistFacts) -> pb.PersistFacts:
    versions = {
        name: version_to(version)
        for name in ("target", "written", "gone", "published")
        if (version := getattr(p, name)) is not None
    }
    return pb.PersistFacts(
        job=p.job,
        bytes_done=p.bytes_done,
        bytes_total=p.bytes_total,
        error=p.error,
        published_unix_s=p.published_unix_s,
        **versions,
    )


def _persist_from(m: pb.PersistFacts) -> PersistFacts:
    check_job(m.job)
    versions = {
        name: version_from(getattr(m, name))
        for name in ("target", "written", "gone", "published")
        if m.HasField(name)
    }
    return PersistFacts(
        job=m.job,
        bytes_done=m.bytes_done,
        bytes_total=m.bytes_total,
        error=m.error,
        published_unix_s=m.published_unix_s,
        **versions,
    )


def slot_to(s: SlotFacts) -> pb.SlotFacts:
    return pb.SlotFacts(
        slot=s.slot,
        address=s.address,
        trainer=trainer_to(s.trainer) if s.trainer else None,
        data=[data_to(d) for d in s.data],
        parity=[parity_to(p) for p in s.parity],
        counters=pb.SlotCounters(**{name: getattr(s.counters, name) for name in _COUNTERS}),
        short=s.short,
        accused=[_accusation_to(a) for a in s.accused],
        vows=[_vow_to(v) for v in s.vows],
        plane=s.plane,
        persist=[_persist_to(p) for p in s.persist],
        unsealed=_unsealed_to(s.unsealed) if s.unsealed else None,
    )


def slot_from(m: pb.SlotFacts) -> SlotFacts:
    check_slot(m.slot)
    if max(len(m.data), len(m.parity), len(m.persist)) > MAX_HOLDINGS:
        raise malformed(f"a slot with {len(m.data)} shards and {len(m.parity)} parity blocks")
    if len(m.accused) > MAX_ACCUSED:
        raise malformed(f"a slot that accuses {len(m.accused)} nodes")
    if len(m.vows) > MAX_JOBS:
        raise malformed(f"a slot that speaks of the restores of {len(m.vows)} jobs")
    if m.address:
        check_peer_address(m.address)
    if m.plane:
        check_name("the name of a plane", m.plane)
    return SlotFacts(
        slot=m.slot,
        address=m.address,
        trainer=_trainer_from(m.trainer) if m.HasField("trainer") else None,
        data=tuple(_data_from(d) for d in m.data),
        parity=tuple(_parity_from(p) for p in m.parity),
        counters=SlotCounters(**{name: getattr(m.counters, name) for name in _COUNTERS}),
        short=tuple(m.short),
        accused=tuple(_accusation_from(a) for a in m.accused),
        vows=tuple(_vow_from(v) for v in m.vows),
        plane=m.plane or GRPC,
        persist=tuple(_persist_from(p) for p in m.persist),
        unsealed=_unsealed_from(m.unsealed) if m.HasField("unsealed") else None,
    )


def job_to(j: JobFacts) -> pb.JobFacts:
    return pb.JobFacts(
        job=j.job,
        world=j.world,
        epoch=j.epoch,
        lineage=j.lineage,
        committed=version_to(j.committed) if j.committed else None,
        committed_in=j.committed_in,
        decision=decision_to(j.decision) if j.decision else None,
        cadence=pb.Cadence(interval=j.cadence.interval, from_step=j.cadence.from_step),
        economy=pb.Economy(serial=j.economy.serial, rows_less=j.economy.rows_less),
        pending=decision_to(j.pending) if j.pending else None,
    )


def job_from(m: pb.JobFacts) -> JobFacts:
    decision = decision_from(m.decision) if m.HasField("decision") else None
    pending = decision_from(m.pending) if m.HasField("pending") else None
    return job_with(m, decision, pending)


def job_with(m: pb.JobFacts, decision: Decision | None, pending: Decision | None) -> JobFacts:
    """As a message says, but for its decisions."""
    check_job(m.job)
    for each in (decision, pending):
        if each is not None and each.job != m.job:
            raise malformed(f"facts of job {m.job!r} carry a decision of {each.job[:40]!r}")
    if decision is not None and (decision.id.epoch != m.lineage or decision.refusal):
        raise malformed(f"a decision that was not released counts as that of epoch {m.lineage}")
    if pending is not None and pending.id.epoch <= m.lineage:
        raise malformed(f"a decision is pending that is not newer than epoch {m.lineage}")
    if m.world > MAX_WORLD:
        raise malformed(f"facts of job {m.job!r} speak of {m.world} ranks, at most {MAX_WORLD}")
    return JobFacts(
        job=m.job,
        world=m.world,
        epoch=checked_epoch(m.epoch),
        lineage=checked_epoch(m.lineage),
        committed=version_from(m.committed) if m.HasField("committed") else None,
        committed_in=checked_epoch(m.committed_in),
        decision=decision,
        cadence=Cadence(max(1, m.cadence.interval), m.cadence.from_step),
        economy=Economy(m.economy.serial, m.economy.rows_less),
        pending=pending,
    )


def node_to(n: NodeFacts) -> pb.NodeFacts:
    return pb.NodeFacts(
        protocol=n.protocol,
        cluster_id=n.cluster_id,
        node=n.node,
        boot=n.boot,
        sequence=n.sequence,
        address=n.address,
        members=members_to(n.members),
        slots=[slot_to(s) for s in n.slots],
        jobs=[job_to(j) for j in n.jobs],
    )


def node_from(m: pb.NodeFacts) -> NodeFacts:
    if not (m.node and m.cluster_id and m.address and m.boot):
        raise malformed("node facts without a node id, cluster id, boot or address")
    check_node_counts(len(m.slots), len(m.jobs))
    for name in (m.node, m.boot):
        check_name("a node id or boot", name)
    check_peer_address(m.address)
    return NodeFacts(
        cluster_id=m.cluster_id,
        node=m.node,
        boot=m.boot,
        sequence=m.sequence,
        address=m.address,
        members=members_from(m.members),
        slots=tuple(slot_from(s) for s in m.slots),
        jobs=tuple(job_from(j) for j in m.jobs),
        protocol=m.protocol,
    )


def check_node_counts(slots: int, jobs: int) -> None:
    """Of all the facts of a node."""
    if slots > MAX_SLOTS or jobs > MAX_JOBS:
        raise malformed(
            f"node facts of {slots} slots and {jobs} jobs, at most {MAX_SLOTS} and {MAX_JOBS} "
            "expected"
        )


def members_to(members: Iterable[tuple[str, str]]) -> list[pb.PeerAddress]:
    return [pb.PeerAddress(node=node, address=address) for node, address in members]


def members_from(told: Sequence[pb.PeerAddress]) -> tuple[tuple[str, str], ...]:
    if len(told) > MAX_NODES:
        raise malformed(f"{len(told)} members, at most {MAX_NODES} expected")
    for peer in told:
        check_name("a node id", peer.node)
        check_peer_address(peer.address)
    return tuple((p.node, p.address) for p in told)


def orders_to(o: Orders) -> pb.Orders:
    return pb.Orders(
        jobs=[job_to(j) for j in o.jobs],
        peers=[pb.PeerSlot(node=h.node, facts=slot_to(f)) for h, f in sorted(o.peers.items())],
        waits=o.waits,
        shelters=[
            pb.Shelter(job=job, groups=[group_to(g) for g in groups])
            for job, groups in sorted(o.shelters.items())
        ],
    )


def orders_from(m: pb.Orders) -> Orders:
    peers = {Home(p.node, p.facts.slot): slot_from(p.facts) for p in m.peers}
    shelters = {s.job: tuple(group_from(g) for g in s.groups) for s in m.shelters}
    return Orders(tuple(job_from(j) for j in m.jobs), peers, dict(m.waits), shelters)
