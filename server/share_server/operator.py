"""Calls to the running hub with the operator's certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from share_core.errors import ConfigError, FedshareError, UnavailableError, error_classes
from share_proto.v1 import hub_pb2_grpc
from share_server.config import ServerConfig
from share_server.layout import Layout

T = TypeVar("T")

_DEADLINE_S = 10.0

CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # two identities in one process must not share a connection
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
"""Channel arguments of every caller on the server's side."""


@contextmanager
def hub_channel(layout: Layout, config: ServerConfig, name: str = "operator") -> Iterator[grpc.Channel]:
    """Open a channel to the hub of this directory with the certificate ``operator`` or ``fleet``.

    Raises:
        ConfigError: the directory is incomplete.
    """
    try:
        credentials = grpc.ssl_channel_credentials(
            layout.ca_cert.read_bytes(), layout.key(name).read_bytes(), layout.certificate(name).read_bytes()
        )
    except OSError as error:
        raise ConfigError(f"{layout.root} is no complete server directory: {error}") from error
    with grpc.secure_channel(config.local_hub_address, credentials, CHANNEL_OPTIONS) as channel:
        yield channel


@contextmanager
def operator_stub(layout: Layout, config: ServerConfig) -> Iterator[hub_pb2_grpc.HubStub]:
    """Open the Hub service as operator."""
    with hub_channel(layout, config) as channel:
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
    name = next((str(value) for key, value in trailing or () if key == "share-error"), "")
    if name in error_classes():
        return error_classes()[name](details)
    if call is not None and call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return UnavailableError(f"no hub answers at {address}: is 'share-server run' running? ({details})")
    return FedshareError(f"the hub at {address} refused: {details}")
