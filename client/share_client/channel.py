"""gRPC channels to one federation, and how their failures become our errors.

Compression is off: factors are noise to a compressor, and inflating is where bombs live. Messages are limited to
4 MiB; payloads travel in 1 MiB chunks.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from share_client.member import Credentials
from share_core.errors import (
    ERROR_KEY,
    AccessError,
    DigestError,
    FedshareError,
    IdentityError,
    RequestError,
    UnavailableError,
    VersionError,
    error_classes,
)

CHUNK_BYTES = 1 << 20
"""Size of one chunk of a payload."""

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # in truth the time a handshake may take, also over a slow line
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A follower may hear nothing for hours: without pings a vanished hub or a forgetful NAT would go unnoticed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # One process may hold several identities (simulations): they must not share a connection.
    ("grpc.use_local_subchannel_pool", 1),
)

_WITHOUT_NAME: dict[grpc.StatusCode, type[FedshareError]] = {
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.UNKNOWN: UnavailableError,
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.NOT_FOUND: RequestError,
    grpc.StatusCode.ALREADY_EXISTS: RequestError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: UnavailableError,
    grpc.StatusCode.FAILED_PRECONDITION: RequestError,
    grpc.StatusCode.ABORTED: UnavailableError,
    grpc.StatusCode.OUT_OF_RANGE: VersionError,
    grpc.StatusCode.UNIMPLEMENTED: RequestError,
    grpc.StatusCode.INTERNAL: UnavailableError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: DigestError,
    grpc.StatusCode.UNAUTHENTICATED: IdentityError,
}
"""What a failure means that no hub code named: mostly the transport, so most of it is worth another try."""


def open_channel(address: str, credentials: Credentials) -> grpc.Channel:
    """Return a channel to ``address`` (host:port) that trusts only the federation and shows our certificate."""
    return _secure(
        address,
        grpc.ssl_channel_credentials(
            root_certificates=credentials.authority,
            private_key=credentials.key,
            certificate_chain=credentials.certificate,
        ),
    )


def open_pinned_channel(address: str, root_pem: bytes) -> grpc.Channel:
    """Return a channel that trusts only ``root_pem`` (an authority or one leaf) and shows no certificate."""
    return _secure(address, grpc.ssl_channel_credentials(root_certificates=root_pem))


def _secure(address: str, credentials: grpc.ChannelCredentials) -> grpc.Channel:
    options = list(_OPTIONS)
    if address.rsplit(":", 1)[0].strip("[]") in ("localhost", "127.0.0.1", "::1"):
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.secure_channel(address, credentials, options=options, compression=grpc.Compression.NoCompression)


def error_from_rpc(error: grpc.RpcError, action: str) -> FedshareError:
    """Return the error of share_core.errors that a failed call stands for.

    The hub names the class in trailing metadata and gives the sentence; both are kept. Without a name the
    status code decides, and the sentence says what we were doing (``action``).
    """
    code = error.code()
    details = error.details() or "no details"
    named = error_classes().get(_named(error))
    if named is not None:
        return named(details)
    cls = _WITHOUT_NAME.get(code, FedshareError)
    return cls(f"{action}: {code.name if code else 'UNKNOWN'}: {details}")


def _named(error: grpc.RpcError) -> str:
    metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    for key, value in metadata:
        if key == ERROR_KEY:
            return value.decode("ascii", "replace") if isinstance(value, bytes) else value
    return ""
