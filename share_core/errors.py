"""Every error that fedshare raises on purpose.

::

    FedshareError                      FAILED: one sentence: what is wrong, expected and got, what to do
    ├── PayloadError                   a payload cannot be what it claims to be          INVALID_ARGUMENT
    │   ├── HeaderError                the safetensors header lies or cannot be read     INVALID_ARGUMENT
    │   ├── TensorNameError            a tensor that does not belong here, or is missing INVALID_ARGUMENT
    │   ├── TensorShapeError           a shape or rank that does not fit the space       INVALID_ARGUMENT
    │   ├── TensorTypeError            a dtype that is not allowed                       INVALID_ARGUMENT
    │   ├── NonFiniteError             NaN, infinity, or values whose products are        INVALID_ARGUMENT
    │   ├── ParserError                reading it ends the reader, or takes too much     INVALID_ARGUMENT
    │   ├── DigestError                bytes do not match their announced SHA-256        DATA_LOSS
    │   ├── ManifestError              a statement of the hub that is not signed or does not follow  DATA_LOSS
    │   └── PayloadTooLargeError       larger than the space allows                      RESOURCE_EXHAUSTED
    ├── RequestError                   a request that makes no sense by itself           INVALID_ARGUMENT
    │   ├── TaskNameError              a task id outside the allowed alphabet            INVALID_ARGUMENT
    │   ├── UpdateIdError              an update id that is no 128-bit hexadecimal       INVALID_ARGUMENT
    │   └── SignatureError             an update that its sender has not signed so       INVALID_ARGUMENT
    ├── SpaceMismatchError             another backbone than the space's                 FAILED_PRECONDITION
    ├── VersionError                   a version this space does not have                OUT_OF_RANGE
    │   └── RebaseError                a version no longer kept: fetch and train anew    FAILED_PRECONDITION
    ├── UnknownTaskError               no such task, and creating it was not asked for   NOT_FOUND
    ├── UnknownUpdateError             no such update                                    NOT_FOUND
    ├── UpdateConflictError            same update id, other bytes                       ALREADY_EXISTS
    ├── AccessError                    an identity that may not do this                  PERMISSION_DENIED
    ├── IdentityError                  no usable identity                                UNAUTHENTICATED
    │   ├── TokenError                 join token unreadable, forged, used or expired    UNAUTHENTICATED
    │   └── CertificateError           certificate unreadable, expired or not ours       UNAUTHENTICATED
    ├── UnavailableError               try again later                                   UNAVAILABLE
    │   ├── OverloadError              too much at once: try again after the hint        RESOURCE_EXHAUSTED
    │   └── StorageError               the disk refused; nothing was acknowledged        UNAVAILABLE
    └── ConfigError                    a configuration or data file that cannot be used  FAILED_PRECONDITION
        └── AdapterError               an adapter directory that cannot be used          FAILED_PRECONDITION
            └── UnsupportedAdapterError a kind of adapter that is not plain LoRA         FAILED_PRECONDITION

Each class knows the gRPC status it travels as (``grpc_code``, a name, so that this module needs no gRPC).
"""

from __future__ import annotations

from typing import ClassVar

ERROR_KEY = "share-error"
"""Trailing metadata of a gRPC answer that names the class of a refusal."""

GO_AHEAD_KEY = "share-go-ahead"
"""Initial metadata of a Submit call whose header was admitted: the payload may come."""

RETRY_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata that says after how many milliseconds to try again; the name is gRPC's own (proposal A6)."""


class FedshareError(Exception):
    """Base of every error raised on purpose. The message is one sentence for a person."""

    grpc_code: ClassVar[str] = "INTERNAL"


class PayloadError(FedshareError):
    """A payload cannot be what it claims to be."""

    grpc_code: ClassVar[str] = "INVALID_ARGUMENT"


class HeaderError(PayloadError):
    """The safetensors header lies or cannot be read."""


class TensorNameError(PayloadError):
    """A tensor that does not belong in this payload, or one that is missing."""


class TensorShapeError(PayloadError):
    """A shape or rank that does not fit the space."""


class TensorTypeError(PayloadError):
    """A dtype that is not allowed."""


class NonFiniteError(PayloadError):
    """NaN or infinity in a tensor, or values so large that their products are infinite."""


class ParserError(PayloadError):
    """A payload that ended every process that tried to read it, or took more memory or time than a payload may."""


class DigestError(PayloadError):
    """Bytes that do not match their announced SHA-256 or size."""

    grpc_code: ClassVar[str] = "DATA_LOSS"


class ManifestError(PayloadError):
    """A signed statement of the hub that is forged, malformed, or does not follow the one before."""

    grpc_code: ClassVar[str] = "DATA_LOSS"


class PayloadTooLargeError(PayloadError):
    """A payload larger than the space allows."""

    grpc_code: ClassVar[str] = "RESOURCE_EXHAUSTED"


class RequestError(FedshareError):
    """A request that makes no sense by itself."""

    grpc_code: ClassVar[str] = "INVALID_ARGUMENT"


class TaskNameError(RequestError):
    """A task or member name outside the allowed alphabet."""


class UpdateIdError(RequestError):
    """An update id that is not 32 lower-case hexadecimal digits."""


class SignatureError(RequestError):
    """An update that is not signed by its sender, or under a number that the sender's key has used for another one."""


class SpaceMismatchError(FedshareError):
    """The other side works on another backbone."""

    grpc_code: ClassVar[str] = "FAILED_PRECONDITION"


class VersionError(FedshareError):
    """A version that this space does not have."""

    grpc_code: ClassVar[str] = "OUT_OF_RANGE"


class RebaseError(VersionError):
    """A version that is no longer kept: fetch the newest bases and train from there."""

    grpc_code: ClassVar[str] = "FAILED_PRECONDITION"


class UnknownTaskError(FedshareError):
    """No such task, and the request did not ask to create it."""

    grpc_code: ClassVar[str] = "NOT_FOUND"


class UnknownUpdateError(FedshareError):
    """No such update."""

    grpc_code: ClassVar[str] = "NOT_FOUND"


class UpdateConflictError(FedshareError):
    """An update id that is already durable with other bytes."""

    grpc_code: ClassVar[str] = "ALREADY_EXISTS"


class AccessError(FedshareError):
    """An identity that may not do this."""

    grpc_code: ClassVar[str] = "PERMISSION_DENIED"


class IdentityError(FedshareError):
    """No usable identity."""

    grpc_code: ClassVar[str] = "UNAUTHENTICATED"


class TokenError(IdentityError):
    """A join token that is unreadable, forged, used or expired."""


class CertificateError(IdentityError):
    """A certificate that is unreadable, expired or not of this federation."""


class UnavailableError(FedshareError):
    """Not now; try again later."""

    grpc_code: ClassVar[str] = "UNAVAILABLE"


class OverloadError(UnavailableError):
    """More than the hub takes at once, from this caller or from all; the answer says when to try again."""

    grpc_code: ClassVar[str] = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class StorageError(UnavailableError):
    """The disk refused. Nothing was acknowledged."""


class ConfigError(FedshareError):
    """A configuration or data file that cannot be used."""

    grpc_code: ClassVar[str] = "FAILED_PRECONDITION"


class AdapterError(ConfigError):
    """An adapter directory that is incomplete or contradicts itself."""


class UnsupportedAdapterError(AdapterError):
    """A kind of adapter that is not plain LoRA, named."""


def error_classes() -> dict[str, type[FedshareError]]:
    """Return every error class by its name, the name that travels under :data:`ERROR_KEY`."""
    found: dict[str, type[FedshareError]] = {}
    waiting: list[type[FedshareError]] = [FedshareError]
    while waiting:
        cls = waiting.pop()
        found[cls.__name__] = cls
        waiting.extend(cls.__subclasses__())
    return found
