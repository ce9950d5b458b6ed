from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_STATE_UNSPECIFIED: _ClassVar[UpdateState]
    UPDATE_STATE_ACCEPTED: _ClassVar[UpdateState]
    UPDATE_STATE_MERGED: _ClassVar[UpdateState]
    UPDATE_STATE_REFUSED: _ClassVar[UpdateState]
    UPDATE_STATE_QUARANTINED: _ClassVar[UpdateState]
    UPDATE_STATE_FORGOTTEN: _ClassVar[UpdateState]
UPDATE_STATE_UNSPECIFIED: UpdateState
UPDATE_STATE_ACCEPTED: UpdateState
UPDATE_STATE_MERGED: UpdateState
UPDATE_STATE_REFUSED: UpdateState
UPDATE_STATE_QUARANTINED: UpdateState
UPDATE_STATE_FORGOTTEN: UpdateState

class SiteSpec(_message.Message):
    __slots__ = ("name", "d_out", "d_in", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    D_OUT_FIELD_NUMBER: _ClassVar[int]
    D_IN_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    d_out: int
    d_in: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., d_out: _Optional[int] = ..., d_in: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class DescribeSpaceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeSpaceResponse(_message.Message):
    __slots__ = ("space_id", "backbone", "sites", "version", "k_max", "tau", "rank_limit", "max_payload_bytes", "signer_certificate_pem", "oldest_base_version")
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    K_MAX_FIELD_NUMBER: _ClassVar[int]
    TAU_FIELD_NUMBER: _ClassVar[int]
    RANK_LIMIT_FIELD_NUMBER: _ClassVar[int]
    MAX_PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIGNER_CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    OLDEST_BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    space_id: str
    backbone: str
    sites: _containers.RepeatedCompositeFieldContainer[SiteSpec]
    version: int
    k_max: int
    tau: float
    rank_limit: int
    max_payload_bytes: int
    signer_certificate_pem: bytes
    oldest_base_version: int
    def __init__(self, space_id: _Optional[str] = ..., backbone: _Optional[str] = ..., sites: _Optional[_Iterable[_Union[SiteSpec, _Mapping]]] = ..., version: _Optional[int] = ..., k_max: _Optional[int] = ..., tau: _Optional[float] = ..., rank_limit: _Optional[int] = ..., max_payload_bytes: _Optional[int] = ..., signer_certificate_pem: _Optional[bytes] = ..., oldest_base_version: _Optional[int] = ...) -> None: ...

class SubmitHeader(_message.Message):
    __slots__ = ("update_id", "space_id", "task_id", "create", "payload_size", "payload_sha256", "lease_id", "rows", "offset", "sharing", "schema_sha256", "sequence", "signature", "privacy")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SHARING_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_SHA256_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    space_id: str
    task_id: str
    create: bool
    payload_size: int
    payload_sha256: str
    lease_id: str
    rows: int
    offset: int
    sharing: TaskSharing
    schema_sha256: str
    sequence: int
    signature: bytes
    privacy: str
    def __init__(self, update_id: _Optional[str] = ..., space_id: _Optional[str] = ..., task_id: _Optional[str] = ..., create: bool = ..., payload_size: _Optional[int] = ..., payload_sha256: _Optional[str] = ..., lease_id: _Optional[str] = ..., rows: _Optional[int] = ..., offset: _Optional[int] = ..., sharing: _Optional[_Union[TaskSharing, _Mapping]] = ..., schema_sha256: _Optional[str] = ..., sequence: _Optional[int] = ..., signature: _Optional[bytes] = ..., privacy: _Optional[str] = ...) -> None: ...

class TaskSharing(_message.Message):
    __slots__ = ("open", "organisations")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ORGANISATIONS_FIELD_NUMBER: _ClassVar[int]
    open: bool
    organisations: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, open: bool = ..., organisations: _Optional[_Iterable[str]] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: SubmitHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[SubmitHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SubmitResponse(_message.Message):
    __slots__ = ("update_id", "ingest_seq", "entry_hash", "duplicate")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    INGEST_SEQ_FIELD_NUMBER: _ClassVar[int]
    ENTRY_HASH_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    ingest_seq: int
    entry_hash: str
    duplicate: bool
    def __init__(self, update_id: _Optional[str] = ..., ingest_seq: _Optional[int] = ..., entry_hash: _Optional[str] = ..., duplicate: bool = ...) -> None: ...

class GetUploadRequest(_message.Message):
    __slots__ = ("update_id",)
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    def __init__(self, update_id: _Optional[str] = ...) -> None: ...

class GetUploadResponse(_message.Message):
    __slots__ = ("offset", "receipt")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    offset: int
    receipt: SubmitResponse
    def __init__(self, offset: _Optional[int] = ..., receipt: _Optional[_Union[SubmitResponse, _Mapping]] = ...) -> None: ...

class GetUpdateRequest(_message.Message):
    __slots__ = ("update_id",)
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    def __init__(self, update_id: _Optional[str] = ...) -> None: ...

class GetUpdateResponse(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: UpdateRecord
    def __init__(self, update: _Optional[_Union[UpdateRecord, _Mapping]] = ...) -> None: ...

class UpdateRecord(_message.Message):
    __slots__ = ("update_id", "ingest_seq", "member", "task_id", "state", "reason", "base_version", "version", "staleness", "bytes", "received_unix_ms", "relative_error", "payload_sha256", "signer", "sequence", "signature", "privacy", "lease_id", "rows", "create", "sharing", "schema_sha256")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    INGEST_SEQ_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    SHARING_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_SHA256_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    ingest_seq: int
    member: str
    task_id: str
    state: UpdateState
    reason: str
    base_version: int
    version: int
    staleness: int
    bytes: PayloadBytes
    received_unix_ms: int
    relative_error: float
    payload_sha256: str
    signer: str
    sequence: int
    signature: bytes
    privacy: str
    lease_id: str
    rows: int
    create: bool
    sharing: TaskSharing
    schema_sha256: str
    def __init__(self, update_id: _Optional[str] = ..., ingest_seq: _Optional[int] = ..., member: _Optional[str] = ..., task_id: _Optional[str] = ..., state: _Optional[_Union[UpdateState, str]] = ..., reason: _Optional[str] = ..., base_version: _Optional[int] = ..., version: _Optional[int] = ..., staleness: _Optional[int] = ..., bytes: _Optional[_Union[PayloadBytes, _Mapping]] = ..., received_unix_ms: _Optional[int] = ..., relative_error: _Optional[float] = ..., payload_sha256: _Optional[str] = ..., signer: _Optional[str] = ..., sequence: _Optional[int] = ..., signature: _Optional[bytes] = ..., privacy: _Optional[str] = ..., lease_id: _Optional[str] = ..., rows: _Optional[int] = ..., create: bool = ..., sharing: _Optional[_Union[TaskSharing, _Mapping]] = ..., schema_sha256: _Optional[str] = ...) -> None: ...

class PayloadBytes(_message.Message):
    __slots__ = ("coefficients", "directions", "heads", "envelope")
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    DIRECTIONS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    coefficients: int
    directions: int
    heads: int
    envelope: int
    def __init__(self, coefficients: _Optional[int] = ..., directions: _Optional[int] = ..., heads: _Optional[int] = ..., envelope: _Optional[int] = ...) -> None: ...

class ListUpdatesRequest(_message.Message):
    __slots__ = ("after_seq", "limit")
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after_seq: int
    limit: int
    def __init__(self, after_seq: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListUpdatesResponse(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[UpdateRecord]
    def __init__(self, updates: _Optional[_Iterable[_Union[UpdateRecord, _Mapping]]] = ...) -> None: ...

class FollowVersionsRequest(_message.Message):
    __slots__ = ("space_id", "since_version")
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    space_id: str
    since_version: int
    def __init__(self, space_id: _Optional[str] = ..., since_version: _Optional[int] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("body", "signature")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class DeltaHeader(_message.Message):
    __slots__ = ("from_version", "version", "newest_version", "payload_size", "payload_sha256", "manifest", "data")
    FROM_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    from_version: int
    version: int
    newest_version: int
    payload_size: int
    payload_sha256: str
    manifest: Manifest
    data: bytes
    def __init__(self, from_version: _Optional[int] = ..., version: _Optional[int] = ..., newest_version: _Optional[int] = ..., payload_size: _Optional[int] = ..., payload_sha256: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SnapshotRequired(_message.Message):
    __slots__ = ("newest_version",)
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    newest_version: int
    def __init__(self, newest_version: _Optional[int] = ...) -> None: ...

class FollowVersionsResponse(_message.Message):
    __slots__ = ("delta", "chunk", "snapshot_required", "heartbeat")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_REQUIRED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    delta: DeltaHeader
    chunk: bytes
    snapshot_required: SnapshotRequired
    heartbeat: Manifest
    def __init__(self, delta: _Optional[_Union[DeltaHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., snapshot_required: _Optional[_Union[SnapshotRequired, _Mapping]] = ..., heartbeat: _Optional[_Union[Manifest, _Mapping]] = ...) -> None: ...

class FetchSnapshotRequest(_message.Message):
    __slots__ = ("space_id", "version")
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    space_id: str
    version: int
    def __init__(self, space_id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class SnapshotHeader(_message.Message):
    __slots__ = ("version", "payload_size", "payload_sha256", "manifest", "version_manifest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    payload_size: int
    payload_sha256: str
    manifest: Manifest
    version_manifest: Manifest
    def __init__(self, version: _Optional[int] = ..., payload_size: _Optional[int] = ..., payload_sha256: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., version_manifest: _Optional[_Union[Manifest, _Mapping]] = ...) -> None: ...

class FetchSnapshotResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: SnapshotHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[SnapshotHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class FetchHeadRequest(_message.Message):
    __slots__ = ("space_id", "task_id", "version")
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    space_id: str
    task_id: str
    version: int
    def __init__(self, space_id: _Optional[str] = ..., task_id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class HeadHeader(_message.Message):
    __slots__ = ("version", "payload_size", "payload_sha256", "manifest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    payload_size: int
    payload_sha256: str
    manifest: Manifest
    def __init__(self, version: _Optional[int] = ..., payload_size: _Optional[int] = ..., payload_sha256: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ...) -> None: ...

class FetchHeadResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: HeadHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[HeadHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TaskRecord(_message.Message):
    __slots__ = ("task_id", "owner", "created_version", "updated_version", "updates", "error_bound", "over_budget", "coefficients", "epsilon", "delta")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    CREATED_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPDATED_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    ERROR_BOUND_FIELD_NUMBER: _ClassVar[int]
    OVER_BUDGET_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    owner: str
    created_version: int
    updated_version: int
    updates: int
    error_bound: float
    over_budget: bool
    coefficients: int
    epsilon: float
    delta: float
    def __init__(self, task_id: _Optional[str] = ..., owner: _Optional[str] = ..., created_version: _Optional[int] = ..., updated_version: _Optional[int] = ..., updates: _Optional[int] = ..., error_bound: _Optional[float] = ..., over_budget: bool = ..., coefficients: _Optional[int] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ...) -> None: ...

class ListTasksResponse(_message.Message):
    __slots__ = ("tasks", "version")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskRecord]
    version: int
    def __init__(self, tasks: _Optional[_Iterable[_Union[TaskRecord, _Mapping]]] = ..., version: _Optional[int] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("task_id", "version", "metric", "value", "rows")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    version: int
    metric: str
    value: float
    rows: int
    def __init__(self, task_id: _Optional[str] = ..., version: _Optional[int] = ..., metric: _Optional[str] = ..., value: _Optional[float] = ..., rows: _Optional[int] = ...) -> None: ...

class ReportEvaluationRequest(_message.Message):
    __slots__ = ("evaluations",)
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    def __init__(self, evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ...) -> None: ...

class ReportEvaluationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListEvaluationsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListEvaluationsResponse(_message.Message):
    __slots__ = ("evaluations",)
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    def __init__(self, evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MemberTraffic(_message.Message):
    __slots__ = ("member", "up", "down_deltas", "down_snapshots", "updates", "down_heads")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    DOWN_DELTAS_FIELD_NUMBER: _ClassVar[int]
    DOWN_SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    DOWN_HEADS_FIELD_NUMBER: _ClassVar[int]
    member: str
    up: PayloadBytes
    down_deltas: int
    down_snapshots: int
    updates: int
    down_heads: int
    def __init__(self, member: _Optional[str] = ..., up: _Optional[_Union[PayloadBytes, _Mapping]] = ..., down_deltas: _Optional[int] = ..., down_snapshots: _Optional[int] = ..., updates: _Optional[int] = ..., down_heads: _Optional[int] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("space_id", "version", "tasks", "accepted", "merged", "refused", "k_left_max", "k_right_max", "subscribers", "traffic", "started_unix_ms", "subspace_bytes", "compactions", "quarantined")
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    K_LEFT_MAX_FIELD_NUMBER: _ClassVar[int]
    K_RIGHT_MAX_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBERS_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    SUBSPACE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPACTIONS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    space_id: str
    version: int
    tasks: int
    accepted: int
    merged: int
    refused: int
    k_left_max: int
    k_right_max: int
    subscribers: int
    traffic: _containers.RepeatedCompositeFieldContainer[MemberTraffic]
    started_unix_ms: int
    subspace_bytes: int
    compactions: int
    quarantined: int
    def __init__(self, space_id: _Optional[str] = ..., version: _Optional[int] = ..., tasks: _Optional[int] = ..., accepted: _Optional[int] = ..., merged: _Optional[int] = ..., refused: _Optional[int] = ..., k_left_max: _Optional[int] = ..., k_right_max: _Optional[int] = ..., subscribers: _Optional[int] = ..., traffic: _Optional[_Iterable[_Union[MemberTraffic, _Mapping]]] = ..., started_unix_ms: _Optional[int] = ..., subspace_bytes: _Optional[int] = ..., compactions: _Optional[int] = ..., quarantined: _Optional[int] = ...) -> None: ...

class GetRosterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RosterMember(_message.Message):
    __slots__ = ("member", "role", "key_sha256", "revoked")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    member: str
    role: str
    key_sha256: str
    revoked: bool
    def __init__(self, member: _Optional[str] = ..., role: _Optional[str] = ..., key_sha256: _Optional[str] = ..., revoked: bool = ...) -> None: ...

class GetRosterResponse(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[RosterMember]
    def __init__(self, members: _Optional[_Iterable[_Union[RosterMember, _Mapping]]] = ...) -> None: ...

class ListCertificatesRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class IssuedCertificate(_message.Message):
    __slots__ = ("number", "key_sha256", "member", "certificate_pem")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    number: int
    key_sha256: str
    member: str
    certificate_pem: bytes
    def __init__(self, number: _Optional[int] = ..., key_sha256: _Optional[str] = ..., member: _Optional[str] = ..., certificate_pem: _Optional[bytes] = ...) -> None: ...

class ListCertificatesResponse(_message.Message):
    __slots__ = ("certificates",)
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    certificates: _containers.RepeatedCompositeFieldContainer[IssuedCertificate]
    def __init__(self, certificates: _Optional[_Iterable[_Union[IssuedCertificate, _Mapping]]] = ...) -> None: ...

class BackupRequest(_message.Message):
    __slots__ = ("directory",)
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    directory: str
    def __init__(self, directory: _Optional[str] = ...) -> None: ...

class BackupProgress(_message.Message):
    __slots__ = ("done", "total", "version", "finished")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    version: int
    finished: bool
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., version: _Optional[int] = ..., finished: bool = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("certificate_pem", "serving_certificate_pem")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    SERVING_CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    serving_certificate_pem: bytes
    def __init__(self, certificate_pem: _Optional[bytes] = ..., serving_certificate_pem: _Optional[bytes] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("member", "undo")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    member: str
    undo: bool
    def __init__(self, member: _Optional[str] = ..., undo: bool = ...) -> None: ...

class RevokeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecideUpdateRequest(_message.Message):
    __slots__ = ("update_id", "release", "reason")
    UPDATE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    update_id: str
    release: bool
    reason: str
    def __init__(self, update_id: _Optional[str] = ..., release: bool = ..., reason: _Optional[str] = ...) -> None: ...

class DecideUpdateResponse(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: UpdateRecord
    def __init__(self, update: _Optional[_Union[UpdateRecord, _Mapping]] = ...) -> None: ...
