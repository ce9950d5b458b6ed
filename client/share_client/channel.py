"""gRPC channels to one federation, and how their failures become our errors.

Compression is off: factors are noise to a compressor, and inflating is where bombs live. Messages are limited to
4 MiB; payloads travel in 1 MiB chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc

from share_client.egress import EgressLog
from share_client.member import Credentials
from share_core.errors import (
    ERROR_KEY,
    RETRY_KEY,
    AccessError,
    DigestError,
    FedshareError,
    IdentityError,
    ManifestError,
    OverloadError,
    PayloadTooLargeError,
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

_TOO_LARGE = ("message larger than max", "metadata size exceeds")
"""How gRPC 1.85 words the RESOURCE_EXHAUSTED that no waiting cures, on both ends of the line. All others mean load:
"Concurrent RPC limit exceeded!", a stream reset with ENHANCE_YOUR_CALM. If another release words them differently, what
is too large is tried again with growing waits."""


def open_channel(address: str, credentials: Credentials) -> grpc.Channel:
    """Return a channel to ``address`` (host:port) that trusts only the federation and shows our certificate.

    What is sent over it is written into the egress log of the credentials first, but for the payloads of Submit, which
    :meth:`share_client.link.HubLink.submit` writes down itself.
    """
    return _secure(
        address,
        grpc.ssl_channel_credentials(
            root_certificates=credentials.authority,
            private_key=credentials.key,
            certificate_chain=credentials.certificate,
        ),
        credentials.egress,
    )


def open_pinned_channel(address: str, root_pem: bytes, egress: EgressLog | None = None) -> grpc.Channel:
    """Return a channel that trusts only ``root_pem`` (an authority or one leaf) and shows no certificate."""
    return _secure(address, grpc.ssl_channel_credentials(root_certificates=root_pem), egress)


class _Recorder(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[misc,type-arg,unused-ignore]
    """Writes every request into the egress log before it leaves; a request that cannot be written is not sent."""

    def __init__(self, address: str, egress: EgressLog) -> None:
        self._address = address
        self._egress = egress

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        """Record one request, then make the call."""
        self._egress.call(self._address, client_call_details.method, request)
        return continuation(client_call_details, request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        """Record one request, then make the call."""
        return self.intercept_unary_unary(continuation, client_call_details, request)


def _secure(address: str, credentials: grpc.ChannelCredentials, egress: EgressLog | None) -> grpc.Channel:
    options = list(_OPTIONS)
    if address.rsplit(":", 1)[0].strip("[]") in ("localhost", "127.0.0.1", "::1"):
        options.append(("grpc.enable_http_proxy", 0))
    channel = grpc.secure_channel(address, credentials, options=options, compression=grpc.Compression.NoCompression)
    return channel if egress is None else grpc.intercept_channel(channel, _Recorder(address, egress))


def error_from_rpc(error: grpc.RpcError, action: str) -> FedshareError:
    """Return the error of share_core.errors that a failed call stands for.

    The hub names the class in trailing metadata and gives the sentence; both are kept. Without a name the
    status code decides, and the sentence says what we were doing (``action``).
    """
    code = error.code()
    details = error.details() or "no details"
    metadata = _trailing(error)
    named = error_classes().get(metadata.get(ERROR_KEY, ""))
    sentence = details if named is not None else f"{action}: {code.name if code else 'UNKNOWN'}: {details}"
    if named is OverloadError or (named is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED):
        if named is None and any(words in details for words in _TOO_LARGE):
            return PayloadTooLargeError(sentence)
        return _overload(sentence, metadata.get(RETRY_KEY, ""))
    if named is not None:
        return named(sentence)
    return _WITHOUT_NAME.get(code, FedshareError)(sentence)


def refusal_from_rpc(error: grpc.RpcError, action: str) -> FedshareError:
    """Return what :func:`error_from_rpc` does, for calls that bring signed versions.

    A breach of the signed history is only what is found here. That the other side speaks of one, such as a relay about
    its own upstream, is its refusal like any other: a VersionError.
    """
    refused = error_from_rpc(error, action)
    return VersionError(str(refused)) if isinstance(refused, ManifestError) else refused


def _overload(sentence: str, hint: str) -> OverloadError:
    """Return an OverloadError with the hint in milliseconds; gRPC makes a huge negative number of one that is none."""
    try:
        retry_after_ms = int(hint)
    except ValueError:
        return OverloadError(sentence)
    return OverloadError(sentence, retry_after_ms) if retry_after_ms >= 0 else OverloadError(sentence)


def _trailing(error: grpc.RpcError) -> dict[str, str]:
    """Return the trailing metadata as text; of a key that comes twice the last value."""
    metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    return {key: value.decode("ascii", "replace") if isinstance(value, bytes) else value for key, value in metadata}
