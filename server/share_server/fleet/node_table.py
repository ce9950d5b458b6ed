"""Which key each enrolled member's SuperNode signs with, as the gateway last heard it from the hub."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import lru_cache

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from share_core.errors import UnavailableError
from share_server.fleet.hub_link import EnrolledNode
from share_server.hub import log

REFRESH_SECONDS = 2.0
"""How often the table is read anew; a revocation bites within it."""

MISS_SECONDS = 0.5
"""Pause between two readings on account of identities that do not fit."""


class NodeTable:
    """The table, cached. When the hub is down, the last one is used."""

    def __init__(self, fetch: Callable[[], list[EnrolledNode]]) -> None:
        self._fetch = fetch
        self._nodes: Mapping[str, EnrolledNode] | None = None
        self._fresh = False
        self._complained = False
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()

    def find(self, member: str) -> EnrolledNode | None:
        """Return the node of a member, or None.

        Raises:
            UnavailableError: no table was ever read.
        """
        if self._nodes is None:
            raise UnavailableError("the table of nodes has not been read yet")
        return self._nodes.get(member)

    async def read_again(self) -> None:
        """Have the table read anew for somebody whom it does not let in.

        Returns only after a reading that began after this call, because the answer that follows is final for the
        node. However many ask, the hub is read once in :data:`MISS_SECONDS`.

        Raises:
            UnavailableError: the hub does not answer, so nobody can say who has enrolled since.
        """
        clock = asyncio.get_running_loop().time
        came = clock()
        async with self._lock:
            if self._asked_at <= came:
                await asyncio.sleep(self._asked_at + MISS_SECONDS - clock())
                await self._refresh()
        if not self._fresh:
            raise UnavailableError("the hub does not answer")

    async def keep_fresh(self) -> None:
        """Read the table again and again, until cancelled."""
        while True:
            async with self._lock:
                await self._refresh()
            await asyncio.sleep(REFRESH_SECONDS)

    async def _refresh(self) -> None:
        self._asked_at = asyncio.get_running_loop().time()
        try:
            rows = await asyncio.to_thread(self._fetch)
        except UnavailableError as error:
            if not self._complained:
                log.warning("hub down, using the last table of nodes", reason=str(error))
            self._fresh, self._complained = False, True
            return
        if not self._fresh:
            log.info("table of nodes read", nodes=len(rows))
        self._fresh, self._complained = True, False
        self._nodes = {row.member: row for row in rows}


@lru_cache(maxsize=4096)
def canonical_key(public_key: bytes) -> bytes:
    """Return a PEM public key in the exact form that Flower sends and stores; empty if it is none.

    Empty matches no header, so a broken row shuts its own member out and nobody else.
    """
    try:
        key = serialization.load_pem_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        return b""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
