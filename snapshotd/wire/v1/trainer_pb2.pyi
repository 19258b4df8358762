from snapshotd.wire.v1 import segment_pb2 as _segment_pb2
from snapshotd.wire.v1 import node_pb2 as _node_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ToDaemon(_message.Message):
    __slots__ = ("protocol", "request", "incarnation", "find", "attach", "restore", "claim", "written", "query", "detach", "prepare", "copied", "manifests", "fill")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FIND_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    PASS_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    MANIFESTS_FIELD_NUMBER: _ClassVar[int]
    FILL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    request: int
    incarnation: str
    find: Find
    attach: Attach
    restore: Restore
    claim: Claim
    written: Written
    query: Query
    detach: Detach
    prepare: Prepare
    copied: Copied
    manifests: Manifests
    fill: Fill
    def __init__(self, protocol: _Optional[int] = ..., request: _Optional[int] = ..., incarnation: _Optional[str] = ..., find: _Optional[_Union[Find, _Mapping]] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., restore: _Optional[_Union[Restore, _Mapping]] = ..., claim: _Optional[_Union[Claim, _Mapping]] = ..., written: _Optional[_Union[Written, _Mapping]] = ..., query: _Optional[_Union[Query, _Mapping]] = ..., detach: _Optional[_Union[Detach, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., copied: _Optional[_Union[Copied, _Mapping]] = ..., manifests: _Optional[_Union[Manifests, _Mapping]] = ..., fill: _Optional[_Union[Fill, _Mapping]] = ..., **kwargs) -> None: ...

class ToTrainer(_message.Message):
    __slots__ = ("request", "found", "attached", "restored", "granted", "skip", "accepted", "progress", "refused", "prepared", "manifests_gathered", "filled")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    MANIFESTS_GATHERED_FIELD_NUMBER: _ClassVar[int]
    FILLED_FIELD_NUMBER: _ClassVar[int]
    request: int
    found: Found
    attached: Attached
    restored: Restored
    granted: Granted
    skip: Skip
    accepted: Accepted
    progress: Progress
    refused: Refused
    prepared: Prepared
    manifests_gathered: ManifestsGathered
    filled: Filled
    def __init__(self, request: _Optional[int] = ..., found: _Optional[_Union[Found, _Mapping]] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., restored: _Optional[_Union[Restored, _Mapping]] = ..., granted: _Optional[_Union[Granted, _Mapping]] = ..., skip: _Optional[_Union[Skip, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., manifests_gathered: _Optional[_Union[ManifestsGathered, _Mapping]] = ..., filled: _Optional[_Union[Filled, _Mapping]] = ...) -> None: ...

class Find(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...

class Found(_message.Message):
    __slots__ = ("endpoint",)
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    def __init__(self, endpoint: _Optional[str] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("job", "run_id", "restart_count", "shard", "world", "predicted_image_bytes", "client_version", "decision", "passed_step", "launch", "cpus")
    JOB_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RESTART_COUNT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    PASSED_STEP_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    job: str
    run_id: str
    restart_count: int
    shard: int
    world: int
    predicted_image_bytes: int
    client_version: str
    decision: _node_pb2.DecisionId
    passed_step: int
    launch: str
    cpus: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job: _Optional[str] = ..., run_id: _Optional[str] = ..., restart_count: _Optional[int] = ..., shard: _Optional[int] = ..., world: _Optional[int] = ..., predicted_image_bytes: _Optional[int] = ..., client_version: _Optional[str] = ..., decision: _Optional[_Union[_node_pb2.DecisionId, _Mapping]] = ..., passed_step: _Optional[int] = ..., launch: _Optional[str] = ..., cpus: _Optional[_Iterable[int]] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("cluster_id", "node", "newest")
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    cluster_id: str
    node: str
    newest: Image
    def __init__(self, cluster_id: _Optional[str] = ..., node: _Optional[str] = ..., newest: _Optional[_Union[Image, _Mapping]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("path", "image_offset", "image_bytes", "manifest_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    image_offset: int
    image_bytes: int
    manifest_bytes: int
    def __init__(self, path: _Optional[str] = ..., image_offset: _Optional[int] = ..., image_bytes: _Optional[int] = ..., manifest_bytes: _Optional[int] = ...) -> None: ...

class Restore(_message.Message):
    __slots__ = ("allow_fresh", "reshard")
    ALLOW_FRESH_FIELD_NUMBER: _ClassVar[int]
    RESHARD_FIELD_NUMBER: _ClassVar[int]
    allow_fresh: bool
    reshard: bool
    def __init__(self, allow_fresh: bool = ..., reshard: bool = ...) -> None: ...

class Restored(_message.Message):
    __slots__ = ("decision", "path", "image_offset", "image_bytes", "manifest_bytes", "bytes_copied", "bytes_decoded", "staged_s")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_COPIED_FIELD_NUMBER: _ClassVar[int]
    BYTES_DECODED_FIELD_NUMBER: _ClassVar[int]
    STAGED_S_FIELD_NUMBER: _ClassVar[int]
    decision: _node_pb2.Decision
    path: str
    image_offset: int
    image_bytes: int
    manifest_bytes: int
    bytes_copied: int
    bytes_decoded: int
    staged_s: float
    def __init__(self, decision: _Optional[_Union[_node_pb2.Decision, _Mapping]] = ..., path: _Optional[str] = ..., image_offset: _Optional[int] = ..., image_bytes: _Optional[int] = ..., manifest_bytes: _Optional[int] = ..., bytes_copied: _Optional[int] = ..., bytes_decoded: _Optional[int] = ..., staged_s: _Optional[float] = ...) -> None: ...

class Manifests(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shards: _Optional[_Iterable[int]] = ...) -> None: ...

class ManifestsGathered(_message.Message):
    __slots__ = ("path", "pieces")
    class Piece(_message.Message):
        __slots__ = ("shard", "offset", "bytes", "image_bytes")
        SHARD_FIELD_NUMBER: _ClassVar[int]
        OFFSET_FIELD_NUMBER: _ClassVar[int]
        BYTES_FIELD_NUMBER: _ClassVar[int]
        IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
        shard: int
        offset: int
        bytes: int
        image_bytes: int
        def __init__(self, shard: _Optional[int] = ..., offset: _Optional[int] = ..., bytes: _Optional[int] = ..., image_bytes: _Optional[int] = ...) -> None: ...
    PATH_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    path: str
    pieces: _containers.RepeatedCompositeFieldContainer[ManifestsGathered.Piece]
    def __init__(self, path: _Optional[str] = ..., pieces: _Optional[_Iterable[_Union[ManifestsGathered.Piece, _Mapping]]] = ...) -> None: ...

class Fill(_message.Message):
    __slots__ = ("image_bytes", "shards", "offsets", "lengths", "to")
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    image_bytes: int
    shards: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    to: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, image_bytes: _Optional[int] = ..., shards: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., to: _Optional[_Iterable[int]] = ...) -> None: ...

class Filled(_message.Message):
    __slots__ = ("path", "image_offset", "bytes_local", "bytes_copied", "bytes_decoded", "bytes_received", "seconds", "bytes_stored")
    PATH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOCAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_COPIED_FIELD_NUMBER: _ClassVar[int]
    BYTES_DECODED_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_STORED_FIELD_NUMBER: _ClassVar[int]
    path: str
    image_offset: int
    bytes_local: int
    bytes_copied: int
    bytes_decoded: int
    bytes_received: int
    seconds: float
    bytes_stored: int
    def __init__(self, path: _Optional[str] = ..., image_offset: _Optional[int] = ..., bytes_local: _Optional[int] = ..., bytes_copied: _Optional[int] = ..., bytes_decoded: _Optional[int] = ..., bytes_received: _Optional[int] = ..., seconds: _Optional[float] = ..., bytes_stored: _Optional[int] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("segments",)
    class Segment(_message.Message):
        __slots__ = ("path", "image_offset")
        PATH_FIELD_NUMBER: _ClassVar[int]
        IMAGE_OFFSET_FIELD_NUMBER: _ClassVar[int]
        path: str
        image_offset: int
        def __init__(self, path: _Optional[str] = ..., image_offset: _Optional[int] = ...) -> None: ...
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[Prepared.Segment]
    def __init__(self, segments: _Optional[_Iterable[_Union[Prepared.Segment, _Mapping]]] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("step", "image_bytes", "patience_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    image_bytes: int
    patience_s: float
    def __init__(self, step: _Optional[int] = ..., image_bytes: _Optional[int] = ..., patience_s: _Optional[float] = ...) -> None: ...

class Granted(_message.Message):
    __slots__ = ("path", "image_offset", "image_capacity", "buffer", "block_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    image_offset: int
    image_capacity: int
    buffer: str
    block_bytes: int
    def __init__(self, path: _Optional[str] = ..., image_offset: _Optional[int] = ..., image_capacity: _Optional[int] = ..., buffer: _Optional[str] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class Skip(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Copied(_message.Message):
    __slots__ = ("step", "buffer", "block_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    buffer: str
    block_bytes: int
    def __init__(self, step: _Optional[int] = ..., buffer: _Optional[str] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class Written(_message.Message):
    __slots__ = ("step", "buffer", "image_bytes", "manifest_bytes", "trained")
    STEP_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    step: int
    buffer: str
    image_bytes: int
    manifest_bytes: int
    trained: _containers.RepeatedCompositeFieldContainer[_segment_pb2.StorageExtent]
    def __init__(self, step: _Optional[int] = ..., buffer: _Optional[str] = ..., image_bytes: _Optional[int] = ..., manifest_bytes: _Optional[int] = ..., trained: _Optional[_Iterable[_Union[_segment_pb2.StorageExtent, _Mapping]]] = ...) -> None: ...

class Pass(_message.Message):
    __slots__ = ("step", "reason")
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    step: int
    reason: str
    def __init__(self, step: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Detach(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Accepted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Progress(_message.Message):
    __slots__ = ("committed", "is_protected", "why_not", "waits_for", "sealed", "cadence", "skipped", "passed_step", "repeated_now")
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    IS_PROTECTED_FIELD_NUMBER: _ClassVar[int]
    WHY_NOT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    CADENCE_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    PASSED_STEP_FIELD_NUMBER: _ClassVar[int]
    REPEATED_NOW_FIELD_NUMBER: _ClassVar[int]
    committed: _segment_pb2.Version
    is_protected: bool
    why_not: str
    waits_for: _containers.RepeatedScalarFieldContainer[str]
    sealed: _containers.RepeatedCompositeFieldContainer[_segment_pb2.Version]
    cadence: _node_pb2.Cadence
    skipped: int
    passed_step: int
    repeated_now: int
    def __init__(self, committed: _Optional[_Union[_segment_pb2.Version, _Mapping]] = ..., is_protected: bool = ..., why_not: _Optional[str] = ..., waits_for: _Optional[_Iterable[str]] = ..., sealed: _Optional[_Iterable[_Union[_segment_pb2.Version, _Mapping]]] = ..., cadence: _Optional[_Union[_node_pb2.Cadence, _Mapping]] = ..., skipped: _Optional[int] = ..., passed_step: _Optional[int] = ..., repeated_now: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("code", "what", "remedy")
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    code: str
    what: str
    remedy: str
    def __init__(self, code: _Optional[str] = ..., what: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...
