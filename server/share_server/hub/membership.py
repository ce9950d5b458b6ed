"""What becomes of members after they have enrolled: new certificates before the old ones end, and being shut out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

from share_core.identity import public_key_pem_of_certificate, reissue, renewal_moment
from share_core.names import split_task_id
from share_proto.v1 import hub_pb2
from share_server.config import ServerConfig
from share_server.hub import log
from share_server.hub.access import Caller, Roster
from share_server.hub.clock import now_ms
from share_server.hub.enrolment_service import Authority
from share_server.store.journal import Journal
from share_server.store.members import check_standing, find_member, key_digest, renew_member, revoke_member
from share_server.store.records import MemberRow
from share_server.store.store import Store


class Membership:
    """The calls Renew and Revoke of one hub."""

    def __init__(
        self, store: Store, config: ServerConfig, authority: Authority, roster: Roster, look: Callable[[], None]
    ) -> None:
        """``look`` is called after somebody was shut out: it ends the open calls of those who may not call any more."""
        self._store = store
        self._config = config
        self._authority = authority
        self._roster = roster
        self._look = look

    async def renew(self, caller: Caller) -> hub_pb2.RenewResponse:
        """Return a new certificate for the caller's key; it is recorded when this returns.

        Before half of the life of the last one is over that one is returned, so that neither a lost answer nor a caller
        that asks again and again makes the journal grow.

        Raises:
            CertificateError, AccessError: the caller was replaced or shut out meanwhile.
        """
        key_sha256 = key_digest(public_key_pem_of_certificate(caller.certificate))

        def standing(journal: Journal) -> MemberRow:
            return check_standing(find_member(journal, caller.member), caller.identity, key_sha256)

        member = await self._store.do(standing)
        now = datetime.now(UTC)
        if now >= renewal_moment(member.certificate):
            member = await asyncio.shield(self._record(caller, key_sha256, self._sign(caller, now)))
            log.info("certificate renewed", member=member.member)
        serving = self._sign(caller, now, member.hosts) if member.hosts else b""
        return hub_pb2.RenewResponse(certificate_pem=member.certificate, serving_certificate_pem=serving)

    async def revoke(self, member: str, undo: bool) -> None:
        """Shut a member out, or let it in again; durable and in force when this returns.

        Raises:
            TaskNameError: it is no name of a member. RequestError: nobody of that name has enrolled.
        """
        split_task_id(member)
        row = await asyncio.shield(self._revoke(member, not undo))
        log.info("member revoked" if row.revoked else "member let in again", member=member)

    def _sign(self, caller: Caller, now: datetime, server_names: tuple[str, ...] = ()) -> bytes:
        own = self._authority
        return reissue(own.certificate, own.key, caller.certificate, now, self._config.certificate_days, server_names)

    async def _record(self, caller: Caller, key_sha256: str, certificate: bytes) -> MemberRow:
        row = await self._store.do(
            lambda journal: renew_member(journal, caller.identity, key_sha256, certificate, now_ms())
        )
        self._roster.put(row)
        return row

    async def _revoke(self, member: str, revoked: bool) -> MemberRow:
        row = await self._store.do(lambda journal: revoke_member(journal, member, revoked, now_ms()))
        self._roster.put(row)
        self._look()
        return row
