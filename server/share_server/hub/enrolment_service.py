"""The Enrolment service, the only one that strangers can reach: small messages, few per minute, one secret each."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import unquote

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import aio

from share_core.errors import OverloadError, RequestError, TokenError
from share_core.identity import check_token, check_token_key, not_after, public_key_pem_of_certificate, sign_csr
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

WRONG_PER_PEER = 20
"""Wrong tokens per minute and peer that are told what is wrong with them."""

WRONG_OVERALL = 200
"""The same over all peers together."""


@dataclass(frozen=True)
class Authority:
    """What signing needs."""

    def __post_init__(self) -> None:
        """Refuse a token key that is none; raises ConfigError."""
        check_token_key(self.token_key)

    certificate: bytes
    """Of the authority, PEM."""
    key: bytes
    """Of the authority, PEM."""
    token_key: bytes
    """Under which join tokens are made."""


class RateLimit:
    """A token bucket per name: ``per_minute`` things, refilled evenly. The oldest names are forgotten."""

    def __init__(self, per_minute: int, what: str = "enrolment calls") -> None:
        self._per_minute = per_minute
        self._what = what
        self._buckets = Buckets(per_minute / 60, float(per_minute), _MOST_PEERS)

    def take(self, name: str, now_s: float) -> None:
        """Count one.

        Raises:
            OverloadError: the name has used up its share.
        """
        bucket = self._buckets.of(name, now_s)
        if (wait := bucket.wait_s(1.0, now_s)) > 0:
            hint = retry_ms(wait)
            raise OverloadError(f"more than {self._per_minute} {self._what} per minute: try again in {hint} ms", hint)
        bucket.take(1.0)


class WrongTokens:
    """How many wrong tokens are answered with what is wrong with them, per minute: per peer, and by all together.

    Those beyond it are all told the same and leave next to nothing in the log. A right token is never counted and never
    turned away here, whoever shares its address: it proves itself, and checking one costs microseconds. What keeps
    tokens from being guessed is their length (:data:`share_core.identity.token.KEY_BYTES`), not this.
    """

    def __init__(self, per_peer: int = WRONG_PER_PEER, overall: int = WRONG_OVERALL) -> None:
        self._peers = RateLimit(per_peer, "wrong join tokens from this address")
        self._overall = RateLimit(overall, "wrong join tokens")

    @contextmanager
    def counted(self, network: str, now_s: float) -> Iterator[None]:
        """Count what the block says of a token.

        Raises:
            OverloadError: instead of the TokenError of the block, once there were too many.
        """
        try:
            yield
        except TokenError:
            self._peers.take(network, now_s)
            self._overall.take("", now_s)
            raise


def peer_network(peer: str) -> str:
    """Return what callers are counted by: the address in gRPC's name of a peer; of IPv6 the /64, which one line has."""
    address = unquote(peer).rpartition(":")[0].partition(":")[2].strip("[]").partition("%")[0]
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    mapped = found.ipv4_mapped
    return str(mapped) if mapped else str(ipaddress.ip_network((found, 64), strict=False))


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServicer):
    """See ``enrolment.proto`` for what each method promises."""

    def __init__(self, store: Store, config: ServerConfig, authority: Authority, roster: Roster, space_id: str) -> None:
        self._store = store
        self._config = config
        self._authority = authority
        self._roster = roster
        self._space_id = space_id
        self._wrong = WrongTokens()

    async def GetAuthority(
        self, request: enrolment_pb2.GetAuthorityRequest, context: Context
    ) -> enrolment_pb2.GetAuthorityResponse:
        """Return the authority's certificate."""
        return enrolment_pb2.GetAuthorityResponse(ca_pem=self._authority.certificate)

    async def Enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.EnrolResponse:
        """Turn a join token into a certificate; member, node key and used token are durable when answered."""
        with self._wrong.counted(peer_network(context.peer()), asyncio.get_running_loop().time()):
            return await self._enrol(request, context)

    async def _enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.EnrolResponse:
        now = datetime.now(UTC)
        token = check_token(request.token, self._authority.token_key, now)
        if token.role not in MEMBER_ROLES:
            raise TokenError(f"a join token cannot make a {token.role}")
        node_key = canonical_node_key(request.node_public_key_pem)
        if node_key and token.role != "trainer":
            raise RequestError(f"a {token.role} has no Flower node: leave node_public_key_pem empty")
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
        asked = MemberRow(
            member=token.identity.member,
            role=token.role,
            key_sha256=key_digest(public_key_pem_of_certificate(certificate)),
            certificate=certificate,
            revoked=False,
            hosts=token.hosts,
        )
        member = await asyncio.shield(self._record(asked, node_key, token.nonce))
        if now >= not_after(member.certificate):
            raise TokenError(
                f"join token for {member.member} was used already, and the certificate it gave has expired: ask the "
                "operator for a new token"
            )
        log.info("enrolled", member=member.member, role=member.role, peer=context.peer())
        return enrolment_pb2.EnrolResponse(
            certificate_pem=member.certificate,
            ca_pem=self._authority.certificate,
            hub_address=self._config.hub_address,
            gateway_address=self._config.gateway_address,
            space_id=self._space_id,
            member=member.member,
            serving_certificate_pem=serving,
        )

    async def _record(self, asked: MemberRow, node_key: bytes, nonce: str) -> MemberRow:
        member = await self._store.do(lambda journal: enrol_member(journal, asked, node_key, nonce, now_ms()))
        self._roster.put(member)
        return member


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
