from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lease(_message.Message):
    __slots__ = ("lease_id", "node_id", "space_id", "hub_address", "deadline_unix_ms", "max_updates")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_ID_FIELD_NUMBER: _ClassVar[int]
    HUB_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_UPDATES_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    node_id: int
    space_id: str
    hub_address: str
    deadline_unix_ms: int
    max_updates: int
    def __init__(self, lease_id: _Optional[str] = ..., node_id: _Optional[int] = ..., space_id: _Optional[str] = ..., hub_address: _Optional[str] = ..., deadline_unix_ms: _Optional[int] = ..., max_updates: _Optional[int] = ...) -> None: ...

class LeaseOutcome(_message.Message):
    __slots__ = ("lease_id", "error_code", "reason")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    error_code: int
    reason: str
    def __init__(self, lease_id: _Optional[str] = ..., error_code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class DispatchRequest(_message.Message):
    __slots__ = ("online_node_ids", "outcomes")
    ONLINE_NODE_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    online_node_ids: _containers.RepeatedScalarFieldContainer[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[LeaseOutcome]
    def __init__(self, online_node_ids: _Optional[_Iterable[int]] = ..., outcomes: _Optional[_Iterable[_Union[LeaseOutcome, _Mapping]]] = ...) -> None: ...

class DispatchResponse(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    def __init__(self, leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ...) -> None: ...

class CloseLeaseRequest(_message.Message):
    __slots__ = ("lease_id", "idle", "submitted")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    idle: bool
    submitted: int
    def __init__(self, lease_id: _Optional[str] = ..., idle: bool = ..., submitted: _Optional[int] = ...) -> None: ...

class CloseLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Node(_message.Message):
    __slots__ = ("member", "public_key_pem", "node_id", "revoked", "key_sha256")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_PEM_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    member: str
    public_key_pem: bytes
    node_id: int
    revoked: bool
    key_sha256: str
    def __init__(self, member: _Optional[str] = ..., public_key_pem: _Optional[bytes] = ..., node_id: _Optional[int] = ..., revoked: bool = ..., key_sha256: _Optional[str] = ...) -> None: ...

class ListNodesResponse(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ...) -> None: ...

class BindNodeRequest(_message.Message):
    __slots__ = ("member", "node_id")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    member: str
    node_id: int
    def __init__(self, member: _Optional[str] = ..., node_id: _Optional[int] = ...) -> None: ...

class BindNodeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetNodeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetNodeResponse(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: Node
    def __init__(self, node: _Optional[_Union[Node, _Mapping]] = ...) -> None: ...
