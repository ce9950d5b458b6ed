"""The gateway's way to the SuperLink on this machine."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from share_core.errors import UnavailableError

_IDLE_SECONDS = 4.0
"""An idle connection is dropped before SuperLink drops it (5 s), so that no request meets a closing one."""


class Upstream:
    """Keep-alive connections to the SuperLink. Its address may change while this lives."""

    def __init__(self, authority: Path, address: str) -> None:
        self.address = address
        self._client = httpx.AsyncClient(
            verify=ssl.create_default_context(cafile=str(authority)),
            trust_env=False,
            timeout=httpx.Timeout(25.0, connect=3.0),
            limits=httpx.Limits(max_connections=512, keepalive_expiry=_IDLE_SECONDS),
        )

    async def send(
        self, path: str, headers: list[tuple[bytes, bytes]], body: bytes | AsyncIterator[bytes]
    ) -> httpx.Response:
        """Send one POST and return the response with its body still unread; close it when done.

        Raises:
            UnavailableError: the SuperLink did not answer.
        """
        request = self._client.build_request("POST", f"https://{self.address}{path}", headers=headers, content=body)
        try:
            return await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise UnavailableError(f"SuperLink did not answer: {type(error).__name__}") from error

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()
