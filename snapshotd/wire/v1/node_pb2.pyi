from snapshotd.wire.v1 import segment_pb2 as _segment_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_NONE: _ClassVar[Tier]
    TIER_LOCAL: _ClassVar[Tier]
    TIER_GROUP: _ClassVar[Tier]
    TIER_PERSISTENT: _ClassVar[Tier]

class RefusalKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_KIND_UNSPECIFIED: _ClassVar[RefusalKind]
    REFUSAL_KIND_LOST: _ClassVar[RefusalKind]
    REFUSAL_KIND_CANNOT_PROTECT: _ClassVar[RefusalKind]
    REFUSAL_KIND_OTHER_WORLD: _ClassVar[RefusalKind]
TIER_UNSPECIFIED: Tier
TIER_NONE: Tier
TIER_LOCAL: Tier
TIER_GROUP: Tier
TIER_PERSISTENT: Tier
REFUSAL_KIND_UNSPECIFIED: RefusalKind
REFUSAL_KIND_LOST: RefusalKind
REFUSAL_KIND_CANNOT_PROTECT: RefusalKind
REFUSAL_KIND_OTHER_WORLD: RefusalKind

class Home(_message.Message):
    __slots__ = ("node", "slot")
    NODE_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    node: str
    slot: int
    def __init__(self, node: _Optional[str] = ..., slot: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("shard", "home")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    shard: int
    home: Home
    def __init__(self, shard: _Optional[int] = ..., home: _Optional[_Union[Home, _Mapping]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("members", "parity", "unkept")
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    UNKEPT_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    parity: int
    unkept: int
    def __init__(self, members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., parity: _Optional[int] = ..., unkept: _Optional[int] = ...) -> None: ...

class PeerAddress(_message.Message):
    __slots__ = ("node", "address")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node: str
    address: str
    def __init__(self, node: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class DecisionId(_message.Message):
    __slots__ = ("epoch", "node")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    node: str
    def __init__(self, epoch: _Optional[int] = ..., node: _Optional[str] = ...) -> None: ...

class Incarnation(_message.Message):
    __slots__ = ("shard", "id")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    shard: int
    id: str
    def __init__(self, shard: _Optional[int] = ..., id: _Optional[str] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("id", "job", "world", "groups", "incarnations", "restore", "fresh", "refusal", "tier", "committed", "refusal_kind", "saved_world", "saved_groups")
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_KIND_FIELD_NUMBER: _ClassVar[int]
    SAVED_WORLD_FIELD_NUMBER: _ClassVar[int]
    SAVED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    id: DecisionId
    job: str
    world: int
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    incarnations: _containers.RepeatedCompositeFieldContainer[Incarnation]
    restore: _segment_pb2.Version
    fresh: Fresh
    refusal: str
    tier: Tier
    committed: _segment_pb2.Version
    refusal_kind: RefusalKind
    saved_world: int
    saved_groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, id: _Optional[_Union[DecisionId, _Mapping]] = ..., job: _Optional[str] = ..., world: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., incarnations: _Optional[_Iterable[_Union[Incarnation, _Mapping]]] = ..., restore: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., fresh: _Optional[_Union[Fresh, _Mapping]] = ..., refusal: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., committed: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., refusal_kind: _Optional[_Union[RefusalKind, str]] = ..., saved_world: _Optional[int] = ..., saved_groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class Fresh(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DataHolding(_message.Message):
    __slots__ = ("job", "shard", "version", "image_bytes", "content_digest", "world")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    job: str
    shard: int
    version: _segment_pb2.Version
    image_bytes: int
    content_digest: bytes
    world: int
    def __init__(self, job: _Optional[str] = ..., shard: _Optional[int] = ..., version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., image_bytes: _Optional[int] = ..., content_digest: _Optional[bytes] = ..., world: _Optional[int] = ...) -> None: ...

class Unsealed(_message.Message):
    __slots__ = ("job", "shard", "version", "image_bytes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    job: str
    shard: int
    version: _segment_pb2.Version
    image_bytes: int
    def __init__(self, job: _Optional[str] = ..., shard: _Optional[int] = ..., version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., image_bytes: _Optional[int] = ...) -> None: ...

class ParityHolding(_message.Message):
    __slots__ = ("job", "version", "place", "image_bytes", "content_digests", "shard_bytes", "world")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: _segment_pb2.Version
    place: _segment_pb2.ParityPlace
    image_bytes: int
    content_digests: _containers.RepeatedScalarFieldContainer[bytes]
    shard_bytes: _containers.RepeatedScalarFieldContainer[int]
    world: int
    def __init__(self, job: _Optional[str] = ..., version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., place: _Optional[_Union[_segment_pb2.ParityPlace, _Mapping]] = ..., image_bytes: _Optional[int] = ..., content_digests: _Optional[_Iterable[bytes]] = ..., shard_bytes: _Optional[_Iterable[int]] = ..., world: _Optional[int] = ...) -> None: ...

class TrainerFacts(_message.Message):
    __slots__ = ("job", "run_id", "restart_count", "incarnation", "shard", "world", "waiting", "allow_fresh", "decision", "staged", "failure", "passed_step", "skipped", "present", "launch", "reshard", "damaged")
    JOB_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RESTART_COUNT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FRESH_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PASSED_STEP_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_FIELD_NUMBER: _ClassVar[int]
    RESHARD_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    job: str
    run_id: str
    restart_count: int
    incarnation: str
    shard: int
    world: int
    waiting: bool
    allow_fresh: bool
    decision: DecisionId
    staged: bool
    failure: str
    passed_step: int
    skipped: int
    present: bool
    launch: str
    reshard: bool
    damaged: bool
    def __init__(self, job: _Optional[str] = ..., run_id: _Optional[str] = ..., restart_count: _Optional[int] = ..., incarnation: _Optional[str] = ..., shard: _Optional[int] = ..., world: _Optional[int] = ..., waiting: bool = ..., allow_fresh: bool = ..., decision: _Optional[_Union[DecisionId, _Mapping]] = ..., staged: bool = ..., failure: _Optional[str] = ..., passed_step: _Optional[int] = ..., skipped: _Optional[int] = ..., present: bool = ..., launch: _Optional[str] = ..., reshard: bool = ..., damaged: bool = ...) -> None: ...

class SlotFacts(_message.Message):
    __slots__ = ("slot", "address", "trainer", "data", "parity", "counters", "short", "accused", "plane", "vows", "persist", "unsealed")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SHORT_FIELD_NUMBER: _ClassVar[int]
    ACCUSED_FIELD_NUMBER: _ClassVar[int]
    PLANE_FIELD_NUMBER: _ClassVar[int]
    VOWS_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    UNSEALED_FIELD_NUMBER: _ClassVar[int]
    slot: int
    address: str
    trainer: TrainerFacts
    data: _containers.RepeatedCompositeFieldContainer[DataHolding]
    parity: _containers.RepeatedCompositeFieldContainer[ParityHolding]
    counters: SlotCounters
    short: _containers.RepeatedScalarFieldContainer[str]
    accused: _containers.RepeatedCompositeFieldContainer[Accusation]
    plane: str
    vows: _containers.RepeatedCompositeFieldContainer[Vow]
    persist: _containers.RepeatedCompositeFieldContainer[PersistFacts]
    unsealed: Unsealed
    def __init__(self, slot: _Optional[int] = ..., address: _Optional[str] = ..., trainer: _Optional[_Union[TrainerFacts, _Mapping]] = ..., data: _Optional[_Iterable[_Union[DataHolding, _Mapping]]] = ..., parity: _Optional[_Iterable[_Union[ParityHolding, _Mapping]]] = ..., counters: _Optional[_Union[SlotCounters, _Mapping]] = ..., short: _Optional[_Iterable[str]] = ..., accused: _Optional[_Iterable[_Union[Accusation, _Mapping]]] = ..., plane: _Optional[str] = ..., vows: _Optional[_Iterable[_Union[Vow, _Mapping]]] = ..., persist: _Optional[_Iterable[_Union[PersistFacts, _Mapping]]] = ..., unsealed: _Optional[_Union[Unsealed, _Mapping]] = ...) -> None: ...

class Vow(_message.Message):
    __slots__ = ("job", "since", "staged")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    job: str
    since: int
    staged: DecisionId
    def __init__(self, job: _Optional[str] = ..., since: _Optional[int] = ..., staged: _Optional[_Union[DecisionId, _Mapping]] = ...) -> None: ...

class PersistFacts(_message.Message):
    __slots__ = ("job", "target", "written", "gone", "bytes_done", "bytes_total", "error", "published", "published_unix_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    target: _segment_pb2.Version
    written: _segment_pb2.Version
    gone: _segment_pb2.Version
    bytes_done: int
    bytes_total: int
    error: str
    published: _segment_pb2.Version
    published_unix_s: float
    def __init__(self, job: _Optional[str] = ..., target: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., written: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., gone: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., error: _Optional[str] = ..., published: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., published_unix_s: _Optional[float] = ...) -> None: ...

class Accusation(_message.Message):
    __slots__ = ("node", "what", "count", "cut_off_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CUT_OFF_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    what: str
    count: int
    cut_off_s: float
    def __init__(self, node: _Optional[str] = ..., what: _Optional[str] = ..., count: _Optional[int] = ..., cut_off_s: _Optional[float] = ...) -> None: ...

class SlotCounters(_message.Message):
    __slots__ = ("bytes_sent", "bytes_received", "bytes_copied", "bytes_decoded", "quarantined", "aborted", "allocated_bytes", "repeated_total", "repeated_now")
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_COPIED_FIELD_NUMBER: _ClassVar[int]
    BYTES_DECODED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPEATED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REPEATED_NOW_FIELD_NUMBER: _ClassVar[int]
    bytes_sent: int
    bytes_received: int
    bytes_copied: int
    bytes_decoded: int
    quarantined: int
    aborted: int
    allocated_bytes: int
    repeated_total: int
    repeated_now: int
    def __init__(self, bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., bytes_copied: _Optional[int] = ..., bytes_decoded: _Optional[int] = ..., quarantined: _Optional[int] = ..., aborted: _Optional[int] = ..., allocated_bytes: _Optional[int] = ..., repeated_total: _Optional[int] = ..., repeated_now: _Optional[int] = ...) -> None: ...

class Cadence(_message.Message):
    __slots__ = ("interval", "from_step")
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    interval: int
    from_step: int
    def __init__(self, interval: _Optional[int] = ..., from_step: _Optional[int] = ...) -> None: ...

class Economy(_message.Message):
    __slots__ = ("serial", "rows_less")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    ROWS_LESS_FIELD_NUMBER: _ClassVar[int]
    serial: int
    rows_less: int
    def __init__(self, serial: _Optional[int] = ..., rows_less: _Optional[int] = ...) -> None: ...

class JobFacts(_message.Message):
    __slots__ = ("job", "epoch", "committed", "committed_in", "decision", "cadence", "world", "lineage", "economy", "pending")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_IN_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    CADENCE_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    ECONOMY_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    committed: _segment_pb2.Version
    committed_in: int
    decision: Decision
    cadence: Cadence
    world: int
    lineage: int
    economy: Economy
    pending: Decision
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., committed: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., committed_in: _Optional[int] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ..., cadence: _Optional[_Union[Cadence, _Mapping]] = ..., world: _Optional[int] = ..., lineage: _Optional[int] = ..., economy: _Optional[_Union[Economy, _Mapping]] = ..., pending: _Optional[_Union[Decision, _Mapping]] = ...) -> None: ...

class NodeFacts(_message.Message):
    __slots__ = ("protocol", "cluster_id", "node", "boot", "sequence", "address", "members", "slots", "jobs")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    cluster_id: str
    node: str
    boot: str
    sequence: int
    address: str
    members: _containers.RepeatedCompositeFieldContainer[PeerAddress]
    slots: _containers.RepeatedCompositeFieldContainer[SlotFacts]
    jobs: _containers.RepeatedCompositeFieldContainer[JobFacts]
    def __init__(self, protocol: _Optional[int] = ..., cluster_id: _Optional[str] = ..., node: _Optional[str] = ..., boot: _Optional[str] = ..., sequence: _Optional[int] = ..., address: _Optional[str] = ..., members: _Optional[_Iterable[_Union[PeerAddress, _Mapping]]] = ..., slots: _Optional[_Iterable[_Union[SlotFacts, _Mapping]]] = ..., jobs: _Optional[_Iterable[_Union[JobFacts, _Mapping]]] = ...) -> None: ...

class Telling(_message.Message):
    __slots__ = ("whole", "difference", "heard")
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    HEARD_FIELD_NUMBER: _ClassVar[int]
    whole: NodeFacts
    difference: Difference
    heard: Heard
    def __init__(self, whole: _Optional[_Union[NodeFacts, _Mapping]] = ..., difference: _Optional[_Union[Difference, _Mapping]] = ..., heard: _Optional[_Union[Heard, _Mapping]] = ...) -> None: ...

class Heard(_message.Message):
    __slots__ = ("boot", "sequence")
    BOOT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    boot: str
    sequence: int
    def __init__(self, boot: _Optional[str] = ..., sequence: _Optional[int] = ...) -> None: ...

class Difference(_message.Message):
    __slots__ = ("node", "boot", "base", "sequence", "members", "slots", "slots_gone", "jobs", "jobs_gone")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_GONE_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    JOBS_GONE_FIELD_NUMBER: _ClassVar[int]
    node: str
    boot: str
    base: int
    sequence: int
    members: Members
    slots: _containers.RepeatedCompositeFieldContainer[SlotFacts]
    slots_gone: _containers.RepeatedScalarFieldContainer[int]
    jobs: _containers.RepeatedCompositeFieldContainer[JobDifference]
    jobs_gone: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, node: _Optional[str] = ..., boot: _Optional[str] = ..., base: _Optional[int] = ..., sequence: _Optional[int] = ..., members: _Optional[_Union[Members, _Mapping]] = ..., slots: _Optional[_Iterable[_Union[SlotFacts, _Mapping]]] = ..., slots_gone: _Optional[_Iterable[int]] = ..., jobs: _Optional[_Iterable[_Union[JobDifference, _Mapping]]] = ..., jobs_gone: _Optional[_Iterable[str]] = ...) -> None: ...

class Members(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[PeerAddress]
    def __init__(self, members: _Optional[_Iterable[_Union[PeerAddress, _Mapping]]] = ...) -> None: ...

class JobDifference(_message.Message):
    __slots__ = ("facts", "same_decision", "same_pending")
    FACTS_FIELD_NUMBER: _ClassVar[int]
    SAME_DECISION_FIELD_NUMBER: _ClassVar[int]
    SAME_PENDING_FIELD_NUMBER: _ClassVar[int]
    facts: JobFacts
    same_decision: bool
    same_pending: bool
    def __init__(self, facts: _Optional[_Union[JobFacts, _Mapping]] = ..., same_decision: bool = ..., same_pending: bool = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardStatus(_message.Message):
    __slots__ = ("job", "shard", "home", "generations", "is_protected", "why_not", "waits_for")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    IS_PROTECTED_FIELD_NUMBER: _ClassVar[int]
    WHY_NOT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    job: str
    shard: int
    home: Home
    generations: _containers.RepeatedCompositeFieldContainer[GenerationStatus]
    is_protected: bool
    why_not: str
    waits_for: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., shard: _Optional[int] = ..., home: _Optional[_Union[Home, _Mapping]] = ..., generations: _Optional[_Iterable[_Union[GenerationStatus, _Mapping]]] = ..., is_protected: bool = ..., why_not: _Optional[str] = ..., waits_for: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerationStatus(_message.Message):
    __slots__ = ("version", "state", "age_s", "bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    version: _segment_pb2.Version
    state: str
    age_s: float
    bytes: int
    def __init__(self, version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., state: _Optional[str] = ..., age_s: _Optional[float] = ..., bytes: _Optional[int] = ...) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("node", "address", "state", "silent_s", "reason")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    node: str
    address: str
    state: str
    silent_s: float
    reason: str
    def __init__(self, node: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., silent_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("job", "shards", "homes", "version", "further_losses", "parity", "why")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    HOMES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FURTHER_LOSSES_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    job: str
    shards: _containers.RepeatedScalarFieldContainer[int]
    homes: _containers.RepeatedCompositeFieldContainer[Home]
    version: _segment_pb2.Version
    further_losses: int
    parity: int
    why: str
    def __init__(self, job: _Optional[str] = ..., shards: _Optional[_Iterable[int]] = ..., homes: _Optional[_Iterable[_Union[Home, _Mapping]]] = ..., version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., further_losses: _Optional[int] = ..., parity: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("cluster_id", "node", "boot", "version", "coordinator", "members", "shards", "jobs", "slots", "budget_bytes", "allocated_bytes", "coding", "healthy", "health_reason", "groups", "notes")
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODING_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    HEALTH_REASON_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    cluster_id: str
    node: str
    boot: str
    version: str
    coordinator: str
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    shards: _containers.RepeatedCompositeFieldContainer[ShardStatus]
    jobs: _containers.RepeatedCompositeFieldContainer[JobFacts]
    slots: _containers.RepeatedCompositeFieldContainer[SlotFacts]
    budget_bytes: int
    allocated_bytes: int
    coding: str
    healthy: bool
    health_reason: str
    groups: _containers.RepeatedCompositeFieldContainer[GroupStatus]
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, cluster_id: _Optional[str] = ..., node: _Optional[str] = ..., boot: _Optional[str] = ..., version: _Optional[str] = ..., coordinator: _Optional[str] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[ShardStatus, _Mapping]]] = ..., jobs: _Optional[_Iterable[_Union[JobFacts, _Mapping]]] = ..., slots: _Optional[_Iterable[_Union[SlotFacts, _Mapping]]] = ..., budget_bytes: _Optional[int] = ..., allocated_bytes: _Optional[int] = ..., coding: _Optional[str] = ..., healthy: bool = ..., health_reason: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[GroupStatus, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class InventoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class ShardPlan(_message.Message):
    __slots__ = ("shard", "source", "detail")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    shard: int
    source: str
    detail: str
    def __init__(self, shard: _Optional[int] = ..., source: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class PlanReply(_message.Message):
    __slots__ = ("job", "restorable", "version", "reason", "shards", "world")
    JOB_FIELD_NUMBER: _ClassVar[int]
    RESTORABLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    job: str
    restorable: bool
    version: _segment_pb2.Version
    reason: str
    shards: _containers.RepeatedCompositeFieldContainer[ShardPlan]
    world: int
    def __init__(self, job: _Optional[str] = ..., restorable: bool = ..., version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., reason: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[ShardPlan, _Mapping]]] = ..., world: _Optional[int] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class DropReply(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("protocol", "cluster_id", "job", "version", "shard", "place", "offset", "bytes", "unsealed", "image_bytes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    UNSEALED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    cluster_id: str
    job: str
    version: _segment_pb2.Version
    shard: int
    place: _segment_pb2.ParityPlace
    offset: int
    bytes: int
    unsealed: bool
    image_bytes: int
    def __init__(self, protocol: _Optional[int] = ..., cluster_id: _Optional[str] = ..., job: _Optional[str] = ..., version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., shard: _Optional[int] = ..., place: _Optional[_Union[_segment_pb2.ParityPlace, _Mapping]] = ..., offset: _Optional[int] = ..., bytes: _Optional[int] = ..., unsealed: bool = ..., image_bytes: _Optional[int] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("seal", "parity", "chunk")
    SEAL_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    seal: _segment_pb2.SealRecord
    parity: _segment_pb2.ParityRecord
    chunk: bytes
    def __init__(self, seal: _Optional[_Union[_segment_pb2.SealRecord, _Mapping]] = ..., parity: _Optional[_Union[_segment_pb2.ParityRecord, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class StoreRequest(_message.Message):
    __slots__ = ("opening", "chunk", "record")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    opening: StoreOpening
    chunk: bytes
    record: _segment_pb2.ParityRecord
    def __init__(self, opening: _Optional[_Union[StoreOpening, _Mapping]] = ..., chunk: _Optional[bytes] = ..., record: _Optional[_Union[_segment_pb2.ParityRecord, _Mapping]] = ...) -> None: ...

class StoreOpening(_message.Message):
    __slots__ = ("protocol", "cluster_id", "job", "epoch", "version", "place", "image_bytes", "shard_bytes", "sender")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    cluster_id: str
    job: str
    epoch: int
    version: _segment_pb2.Version
    place: _segment_pb2.ParityPlace
    image_bytes: int
    shard_bytes: _containers.RepeatedScalarFieldContainer[int]
    sender: Home
    def __init__(self, protocol: _Optional[int] = ..., cluster_id: _Optional[str] = ..., job: _Optional[str] = ..., epoch: _Optional[int] = ..., version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., place: _Optional[_Union[_segment_pb2.ParityPlace, _Mapping]] = ..., image_bytes: _Optional[int] = ..., shard_bytes: _Optional[_Iterable[int]] = ..., sender: _Optional[_Union[Home, _Mapping]] = ...) -> None: ...

class StoreReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RangesRequest(_message.Message):
    __slots__ = ("protocol", "cluster_id", "job", "version", "shard", "place", "content_digest", "offsets", "lengths")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    cluster_id: str
    job: str
    version: _segment_pb2.Version
    shard: int
    place: _segment_pb2.ParityPlace
    content_digest: bytes
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, protocol: _Optional[int] = ..., cluster_id: _Optional[str] = ..., job: _Optional[str] = ..., version: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., shard: _Optional[int] = ..., place: _Optional[_Union[_segment_pb2.ParityPlace, _Mapping]] = ..., content_digest: _Optional[bytes] = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class RangesReply(_message.Message):
    __slots__ = ("chunk", "digest")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    digest: bytes
    def __init__(self, chunk: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Orders(_message.Message):
    __slots__ = ("jobs", "peers", "waits", "shelters")
    class WaitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOBS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    SHELTERS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[JobFacts]
    peers: _containers.RepeatedCompositeFieldContainer[PeerSlot]
    waits: _containers.ScalarMap[str, str]
    shelters: _containers.RepeatedCompositeFieldContainer[Shelter]
    def __init__(self, jobs: _Optional[_Iterable[_Union[JobFacts, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[PeerSlot, _Mapping]]] = ..., waits: _Optional[_Mapping[str, str]] = ..., shelters: _Optional[_Iterable[_Union[Shelter, _Mapping]]] = ...) -> None: ...

class Shelter(_message.Message):
    __slots__ = ("job", "groups")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    job: str
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, job: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class PeerSlot(_message.Message):
    __slots__ = ("node", "facts")
    NODE_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    node: str
    facts: SlotFacts
    def __init__(self, node: _Optional[str] = ..., facts: _Optional[_Union[SlotFacts, _Mapping]] = ...) -> None: ...
