"""What the process of a hub and that of a relay have in common: how they listen, fail and end. No PyTorch in here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
from grpc import aio

from share_core.errors import ConfigError, UnavailableError
from share_server.config import join_address
from share_server.hub import log

EXIT_STOPPED = 0
"""Asked to stop, and drained."""

EXIT_FAILED = 1
"""The storage or the merge loop failed; nothing after the failure was acknowledged."""

LAST_GRACE_S = 0.25
"""Seconds for those who watch the health of the hub to learn of its end."""


def bind(server: aio.Server, host: str, port: int, credentials: grpc.ServerCredentials) -> None:
    """Let ``server`` listen on one port.

    Raises:
        UnavailableError: the port is taken. ConfigError: it is not the one that was asked for.
    """
    address = join_address(host, port)
    try:
        bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise UnavailableError(
            f"cannot listen on {address}: is another server using the port? Stop it, or choose another port"
        ) from error
    if bound != port:
        raise ConfigError(f"cannot listen on {address}: got port {bound}")


def log_failures(tasks: Iterable[asyncio.Task[None]]) -> bool:
    """Write down why each of these tasks failed, as far as they have; return whether one did."""
    failed = False
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            log.failure(f"{task.get_name()} failed", error)
            failed = True
    return failed
