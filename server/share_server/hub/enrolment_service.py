"""The Enrolment service, the only one that strangers can reach: small messages, few per minute, one secret each."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import aio

from share_core.errors import OverloadError, RequestError, TokenError
from share_core.identity import check_token, public_key_pem_of_certificate, sign_csr
from share_proto.v1 import enrolment_pb2, enrolment_pb2_grpc
from share_server.config import ServerConfig
from share_server.hub import log
from share_server.hub.access import MEMBER_ROLES, Roster
from share_server.hub.clock import now_ms
from share_server.hub.quota import Buckets, retry_ms
from share_server.store.members import enrol_member, key_digest
from share_server.store.records import MemberRow
from share_server.store.store import Store

Context = aio.ServicerContext[Any, Any]

_MOST_PEERS = 4096


@dataclass(frozen=True)
class Authority:
    """What signing needs."""

    certificate: bytes
    """Of the authority, PEM."""
    key: bytes
    """Of the authority, PEM."""
    token_key: bytes
    """Under which join tokens are made."""


class RateLimit:
    """A token bucket per peer address: ``per_minute`` calls, refilled evenly. The oldest addresses are forgotten."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets = Buckets(per_minute / 60, float(per_minute), _MOST_PEERS)

    def take(self, address: str, now_s: float) -> None:
        """Count one call.

        Raises:
            OverloadError: the address has used up its calls.
        """
        bucket = self._buckets.of(address, now_s)
        if (wait := bucket.wait_s(1.0, now_s)) > 0:
            hint = retry_ms(wait)
            raise OverloadError(
                f"more than {self._per_minute} enrolment calls per minute: try again in {hint} ms", hint
            )
        bucket.take(1.0)


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServicer):
    """See ``enrolment.proto`` for what each method promises."""

    def __init__(self, store: Store, config: ServerConfig, authority: Authority, roster: Roster, space_id: str) -> None:
        self._store = store
        self._config = config
        self._authority = authority
        self._roster = roster
        self._space_id = space_id

    async def GetAuthority(
        self, request: enrolment_pb2.GetAuthorityRequest, context: Context
    ) -> enrolment_pb2.GetAuthorityResponse:
        """Return the authority's certificate."""
        return enrolment_pb2.GetAuthorityResponse(ca_pem=self._authority.certificate)

    async def Enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.EnrolResponse:
        """Turn a join token into a certificate; member, node key and used token are durable when answered."""
        now = datetime.now(UTC)
        token = check_token(request.token, self._authority.token_key, now)
        if token.role not in MEMBER_ROLES:
            raise TokenError(f"a join token cannot make a {token.role}")
        node_key = canonical_node_key(request.node_public_key_pem)
        sign = partial(
            sign_csr,
            self._authority.certificate,
            self._authority.key,
            request.csr_pem,
            token.identity,
            now,
            self._config.certificate_days,
        )
        certificate = sign()
        serving = sign(server_names=token.hosts) if token.hosts else b""
        member = MemberRow(
            member=token.identity.member,
            role=token.role,
            key_sha256=key_digest(public_key_pem_of_certificate(certificate)),
            certificate=certificate,
            revoked=False,
        )
        await asyncio.shield(self._record(member, node_key, token.nonce))
        log.info("enrolled", member=member.member, role=member.role, peer=context.peer())
        return enrolment_pb2.EnrolResponse(
            certificate_pem=certificate,
            ca_pem=self._authority.certificate,
            hub_address=self._config.hub_address,
            gateway_address=self._config.gateway_address,
            space_id=self._space_id,
            member=member.member,
            serving_certificate_pem=serving,
        )

    async def _record(self, member: MemberRow, node_key: bytes, nonce: str) -> None:
        await self._store.do(lambda journal: enrol_member(journal, member, node_key, nonce, now_ms()))
        self._roster.put(member)


def canonical_node_key(public_key_pem: bytes) -> bytes:
    """Return an elliptic-curve public key in its one PEM form; empty stays empty.

    Raises:
        RequestError: it is no such key.
    """
    if not public_key_pem:
        return b""
    try:
        key = serialization.load_pem_public_key(public_key_pem)
    except (ValueError, TypeError) as error:
        raise RequestError("node_public_key_pem cannot be read: expected a PEM public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise RequestError(f"node_public_key_pem is a {type(key).__name__}, expected an elliptic-curve key")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
