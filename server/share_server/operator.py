"""Calls to the running hub with the server's own certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from share_core.errors import ERROR_KEY, ConfigError, FedshareError, UnavailableError, error_classes
from share_proto.v1 import hub_pb2_grpc
from share_server.config import ServerConfig
from share_server.layout import Layout

T = TypeVar("T")

_DEADLINE_S = 10.0

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.use_local_subchannel_pool", 1),  # two identities in one process must not share a connection
    ("grpc.enable_http_proxy", 0),  # the hub is on this machine
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
"""Channel arguments of every caller on the server's side."""


def open_channel(layout: Layout, config: ServerConfig, name: str) -> grpc.Channel:
    """Return a channel to the hub of this directory with the certificate ``operator`` or ``fleet``.

    Raises:
        ConfigError: the directory is incomplete.
    """
    try:
        credentials = grpc.ssl_channel_credentials(
            layout.ca_cert.read_bytes(), layout.key(name).read_bytes(), layout.certificate(name).read_bytes()
        )
    except OSError as error:
        raise ConfigError(
            f"{layout.root} is no complete server directory: {error}: run 'share-server init {layout.root}'"
        ) from error
    # The listener may be bound to every interface; its certificate names the hosts that clients use.
    expected: tuple[str, int | str] = ("grpc.ssl_target_name_override", config.hosts[0].strip("[]"))
    return grpc.secure_channel(config.local_hub_address, credentials, [*CHANNEL_OPTIONS, expected])


@contextmanager
def operator_stub(layout: Layout, config: ServerConfig) -> Iterator[hub_pb2_grpc.HubStub]:
    """Open the Hub service as operator."""
    with open_channel(layout, config, "operator") as channel:
        yield hub_pb2_grpc.HubStub(channel)


def ask(method: Callable[..., T], request: object, address: str) -> T:
    """Call one unary method.

    Raises:
        FedshareError: what the hub refused, as the class it named; UnavailableError if nobody answers.
    """
    try:
        return method(request, timeout=_DEADLINE_S)
    except grpc.RpcError as error:
        raise named_error(error, address) from error


def named_error(error: grpc.RpcError, address: str) -> FedshareError:
    """Return the FedshareError that a failed call carries in its trailing metadata."""
    call = error if isinstance(error, grpc.Call) else None
    details = (call.details() if call else None) or "no details"
    trailing: Any = call.trailing_metadata() if call else None
    name = next((str(value) for key, value in trailing or () if key == ERROR_KEY), "")
    if name in error_classes():
        return error_classes()[name](details)
    if call is not None and call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return UnavailableError(f"no hub answers at {address}: is 'share-server run' running? ({details})")
    return FedshareError(f"the hub at {address} refused: {details}")
