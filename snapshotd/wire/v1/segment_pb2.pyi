from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SegmentKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEGMENT_KIND_UNSPECIFIED: _ClassVar[SegmentKind]
    SEGMENT_KIND_DATA: _ClassVar[SegmentKind]
    SEGMENT_KIND_PARITY: _ClassVar[SegmentKind]

class SegmentState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEGMENT_STATE_UNSPECIFIED: _ClassVar[SegmentState]
    SEGMENT_STATE_FREE: _ClassVar[SegmentState]
    SEGMENT_STATE_WRITING: _ClassVar[SegmentState]
    SEGMENT_STATE_SEALED: _ClassVar[SegmentState]
SEGMENT_KIND_UNSPECIFIED: SegmentKind
SEGMENT_KIND_DATA: SegmentKind
SEGMENT_KIND_PARITY: SegmentKind
SEGMENT_STATE_UNSPECIFIED: SegmentState
SEGMENT_STATE_FREE: SegmentState
SEGMENT_STATE_WRITING: SegmentState
SEGMENT_STATE_SEALED: SegmentState

class Version(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class ParityPlace(_message.Message):
    __slots__ = ("shards", "parity", "stripe", "row")
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    STRIPE_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedScalarFieldContainer[int]
    parity: int
    stripe: int
    row: int
    def __init__(self, shards: _Optional[_Iterable[int]] = ..., parity: _Optional[int] = ..., stripe: _Optional[int] = ..., row: _Optional[int] = ...) -> None: ...

class SegmentHeader(_message.Message):
    __slots__ = ("kind", "state", "image_capacity", "record_capacity", "cluster_id", "job", "version", "shard", "place", "image_bytes", "record_bytes", "record_digest")
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    RECORD_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORD_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    kind: SegmentKind
    state: SegmentState
    image_capacity: int
    record_capacity: int
    cluster_id: str
    job: str
    version: Version
    shard: int
    place: ParityPlace
    image_bytes: int
    record_bytes: int
    record_digest: bytes
    def __init__(self, kind: _Optional[_Union[SegmentKind, str]] = ..., state: _Optional[_Union[SegmentState, str]] = ..., image_capacity: _Optional[int] = ..., record_capacity: _Optional[int] = ..., cluster_id: _Optional[str] = ..., job: _Optional[str] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., shard: _Optional[int] = ..., place: _Optional[_Union[ParityPlace, _Mapping]] = ..., image_bytes: _Optional[int] = ..., record_bytes: _Optional[int] = ..., record_digest: _Optional[bytes] = ...) -> None: ...

class SealRecord(_message.Message):
    __slots__ = ("job", "world", "shard", "version", "image_bytes", "manifest_bytes", "grain_digests", "content_digest")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    GRAIN_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    job: str
    world: int
    shard: int
    version: Version
    image_bytes: int
    manifest_bytes: int
    grain_digests: bytes
    content_digest: bytes
    def __init__(self, job: _Optional[str] = ..., world: _Optional[int] = ..., shard: _Optional[int] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., image_bytes: _Optional[int] = ..., manifest_bytes: _Optional[int] = ..., grain_digests: _Optional[bytes] = ..., content_digest: _Optional[bytes] = ...) -> None: ...

class ParityRecord(_message.Message):
    __slots__ = ("place", "group", "image_bytes", "grain_digests")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GRAIN_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    place: ParityPlace
    group: _containers.RepeatedCompositeFieldContainer[SealRecord]
    image_bytes: int
    grain_digests: bytes
    def __init__(self, place: _Optional[_Union[ParityPlace, _Mapping]] = ..., group: _Optional[_Iterable[_Union[SealRecord, _Mapping]]] = ..., image_bytes: _Optional[int] = ..., grain_digests: _Optional[bytes] = ...) -> None: ...

class StorageExtent(_message.Message):
    __slots__ = ("image_offset", "bytes", "part")
    IMAGE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    image_offset: int
    bytes: int
    part: Part
    def __init__(self, image_offset: _Optional[int] = ..., bytes: _Optional[int] = ..., part: _Optional[_Union[Part, _Mapping]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("start", "whole")
    START_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    start: int
    whole: int
    def __init__(self, start: _Optional[int] = ..., whole: _Optional[int] = ...) -> None: ...

class TensorEntry(_message.Message):
    __slots__ = ("name", "dtype", "shape", "stride", "extent", "extent_offset", "device_type", "requires_grad", "dtensor", "owner", "fqn", "global_shape", "offset", "scattered", "copies")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    EXTENT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TYPE_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_GRAD_FIELD_NUMBER: _ClassVar[int]
    DTENSOR_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    FQN_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SCATTERED_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    stride: _containers.RepeatedScalarFieldContainer[int]
    extent: int
    extent_offset: int
    device_type: str
    requires_grad: bool
    dtensor: DTensorSpec
    owner: str
    fqn: str
    global_shape: _containers.RepeatedScalarFieldContainer[int]
    offset: _containers.RepeatedScalarFieldContainer[int]
    scattered: bool
    copies: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., stride: _Optional[_Iterable[int]] = ..., extent: _Optional[int] = ..., extent_offset: _Optional[int] = ..., device_type: _Optional[str] = ..., requires_grad: bool = ..., dtensor: _Optional[_Union[DTensorSpec, _Mapping]] = ..., owner: _Optional[str] = ..., fqn: _Optional[str] = ..., global_shape: _Optional[_Iterable[int]] = ..., offset: _Optional[_Iterable[int]] = ..., scattered: bool = ..., copies: _Optional[int] = ...) -> None: ...

class ReplicaSet(_message.Message):
    __slots__ = ("ranks",)
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class DTensorSpec(_message.Message):
    __slots__ = ("global_shape", "global_stride", "placements", "mesh_shape", "mesh_dim_names")
    GLOBAL_SHAPE_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_STRIDE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    MESH_SHAPE_FIELD_NUMBER: _ClassVar[int]
    MESH_DIM_NAMES_FIELD_NUMBER: _ClassVar[int]
    global_shape: _containers.RepeatedScalarFieldContainer[int]
    global_stride: _containers.RepeatedScalarFieldContainer[int]
    placements: _containers.RepeatedScalarFieldContainer[str]
    mesh_shape: _containers.RepeatedScalarFieldContainer[int]
    mesh_dim_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, global_shape: _Optional[_Iterable[int]] = ..., global_stride: _Optional[_Iterable[int]] = ..., placements: _Optional[_Iterable[str]] = ..., mesh_shape: _Optional[_Iterable[int]] = ..., mesh_dim_names: _Optional[_Iterable[str]] = ...) -> None: ...

class ParameterGroup(_message.Message):
    __slots__ = ("parameters",)
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, parameters: _Optional[_Iterable[str]] = ...) -> None: ...

class OptimizerShape(_message.Message):
    __slots__ = ("name", "type", "groups")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    groups: _containers.RepeatedCompositeFieldContainer[ParameterGroup]
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[ParameterGroup, _Mapping]]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("format", "job", "world", "shard", "step", "extents", "tensors", "skeleton", "names", "optimizers", "replica_sets")
    class NamesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SKELETON_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZERS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_SETS_FIELD_NUMBER: _ClassVar[int]
    format: int
    job: str
    world: int
    shard: int
    step: int
    extents: _containers.RepeatedCompositeFieldContainer[StorageExtent]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorEntry]
    skeleton: StorageExtent
    names: _containers.ScalarMap[str, str]
    optimizers: _containers.RepeatedCompositeFieldContainer[OptimizerShape]
    replica_sets: _containers.RepeatedCompositeFieldContainer[ReplicaSet]
    def __init__(self, format: _Optional[int] = ..., job: _Optional[str] = ..., world: _Optional[int] = ..., shard: _Optional[int] = ..., step: _Optional[int] = ..., extents: _Optional[_Iterable[_Union[StorageExtent, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[TensorEntry, _Mapping]]] = ..., skeleton: _Optional[_Union[StorageExtent, _Mapping]] = ..., names: _Optional[_Mapping[str, str]] = ..., optimizers: _Optional[_Iterable[_Union[OptimizerShape, _Mapping]]] = ..., replica_sets: _Optional[_Iterable[_Union[ReplicaSet, _Mapping]]] = ...) -> None: ...
