"""Honest updates of a wanted size, thousands per second: random factors, made once, changed in their last floats.

What is sent has to be new bytes every time (equal payloads are one file at the hub), and hashing a mebibyte per update
in the load generator would measure the load generator. So each of a few payloads keeps the state of its SHA-256 before
its last 64 bytes; an update replaces those 16 floats and hashes only them.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import struct
from dataclasses import dataclass

from share_core.fingerprint import space_id_of
from share_core.types import Factors, SiteSpec, SiteUpdate, SpaceSpec, Update
from share_proto.v1 import hub_pb2
from share_server.local import Holder, sign_header

_TAIL_FLOATS = 16
_CHUNK = 2**20
_HEADER_BYTES = 1024
"""More than the header of such a payload; what is left of the wanted size stays unused."""


def upload_space(payload_bytes: int, rank: int = 32, k_max: int = 16) -> SpaceSpec:
    """Return a space of two sites in which a free adapter of ``rank`` is just below ``payload_bytes``.

    ``tau`` is lax and ``k_max`` small, so that merging costs little beside receiving.
    """
    rows = max(8, (payload_bytes - _HEADER_BYTES) // (2 * 4 * rank))  # of both sides together
    return _space("bench-hub", rows - rows // 2, rows // 2, rank, k_max, tau=0.95)


def delta_space(delta_bytes: int, rank: int, k_max: int) -> SpaceSpec:
    """Return a space of two sites in which appending ``rank`` directions makes a delta of about ``delta_bytes``."""
    rows = max(8, delta_bytes // (2 * 4 * rank))
    return _space("bench-broadcast", rows - rows // 2, rows // 2, rank, k_max, tau=0.01)


def _space(name: str, d_out: int, d_in: int, rank: int, k_max: int, tau: float) -> SpaceSpec:
    sites = {
        site: SiteSpec(site, d_out, d_in, hashlib.sha256(f"{name}/{site}".encode()).hexdigest()) for site in ("a", "b")
    }
    return SpaceSpec(space_id_of(sites), name, sites, k_max=k_max, tau=tau, rank_limit=max(rank, k_max))


def random_sites(spec: SpaceSpec, rank: int, seed: int) -> dict[str, SiteUpdate]:
    """Return random factors of ``rank`` at every site."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return {
        name: SiteUpdate(
            core=None,
            residual=Factors(torch.randn(s.d_out, rank, generator=draw), torch.randn(s.d_in, rank, generator=draw)),
        )
        for name, s in spec.sites.items()
    }


@dataclass(frozen=True)
class _Body:
    """A payload without its last 64 bytes."""

    size: int
    """Bytes of the whole payload."""
    digest: hashlib._Hash
    """State of the SHA-256 before the tail; copied, never changed."""
    whole: tuple[bytes, ...]
    """Serialised messages that no tail changes."""
    last: tuple[bytes, bytes]
    """Tag and length, then the bytes, of the message that the tail ends."""


@dataclass(frozen=True)
class Prepared:
    """One update, ready to be sent: everything but the large last message, which is made when it is needed."""

    update_id: str
    """32 hexadecimal digits."""
    sha256: str
    """Of the payload."""
    header: bytes
    """The serialised first message."""
    body: _Body
    """All but the tail; kept, so that sending again sends the same bytes."""
    tail: bytes
    """The last 64 bytes of the payload."""

    def chunks(self) -> list[bytes]:
        """Return the serialised messages after the header."""
        return [*self.body.whole, b"".join((*self.body.last, self.tail))]


class Source:
    """One payload that many updates are made of."""

    def __init__(self, spec: SpaceSpec, rank: int, seed: int) -> None:
        self._spec = spec
        self._sites = random_sites(spec, rank, seed)
        self._random = random.Random(secrets.token_bytes(16))
        self._body = self._encode(0)

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return self._body.size

    def rebase(self, version: int) -> None:
        """Express it against another version: free adapters have no cores, so only the header changes."""
        self._body = self._encode(version)

    def prepare(self, task_id: str, holder: Holder) -> Prepared:
        """Return a new update of a task, signed by who will send it: other bytes than all before."""
        tail = struct.pack(f"<{_TAIL_FLOATS}f", *(self._random.uniform(-1.0, 1.0) for _ in range(_TAIL_FLOATS)))
        digest = self._body.digest.copy()
        digest.update(tail)
        header = hub_pb2.SubmitHeader(
            update_id=secrets.token_hex(16),
            space_id=self._spec.space_id,
            task_id=task_id,
            create=True,
            payload_size=self.size,
            payload_sha256=digest.hexdigest(),
        )
        message = hub_pb2.SubmitRequest(header=sign_header(header, holder)).SerializeToString()
        return Prepared(header.update_id, header.payload_sha256, message, self._body, tail)

    def _encode(self, version: int) -> _Body:
        from share_core.wire import encode_update

        payload = encode_update(Update(base_version=version, sites=self._sites))
        body = payload[: -4 * _TAIL_FLOATS]
        pieces = [body[start : start + _CHUNK] for start in range(0, len(body), _CHUNK)]
        if len(pieces[-1]) + 4 * _TAIL_FLOATS > _CHUNK:  # the tail alone would overflow the last chunk
            pieces.append(b"")
        return _Body(
            size=len(payload),
            digest=hashlib.sha256(body),
            whole=tuple(hub_pb2.SubmitRequest(chunk=piece).SerializeToString() for piece in pieces[:-1]),
            last=(b"\x12" + _varint(len(pieces[-1]) + 4 * _TAIL_FLOATS), pieces[-1]),
        )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
