"""Members, their nodes and the join tokens that were used."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from dataclasses import replace

from share_core.errors import AccessError, CertificateError, RequestError, TokenError
from share_core.identity import Identity
from share_server.store.journal import Journal
from share_server.store.records import CertificateRow, MemberRow, NodeRow


def key_digest(public_key_pem: bytes) -> str:
    """Return the hexadecimal SHA-256 by which a public key (PEM) is remembered."""
    return hashlib.sha256(public_key_pem).hexdigest()


def enrol_member(journal: Journal, row: MemberRow, node_key: bytes, nonce: str, now_ms: int) -> MemberRow:
    """Record a member, its node's key and the used token in one transaction; return the member as it is then.

    A token works once. The same token with the same keys is the same request sent again, because its answer was lost:
    nothing is changed, and the certificate of that time or a newer one is returned. Not so once the member has enrolled
    with another key: who kept the old one and its token would take the member back. Enrolling a known member with a new
    token replaces its certificate key and its node key.

    Raises:
        TokenError: the token was used before.
        AccessError: the member is shut out.
        RequestError: the node key belongs to another member.
    """
    used = journal.row("SELECT key_sha256 FROM used_tokens WHERE nonce = ?", (nonce,))
    known = find_member(journal, row.member)
    if known is not None and known.revoked:
        raise AccessError(f"member {row.member} is shut out of this federation")
    if used is not None:
        if used["key_sha256"] != row.key_sha256 or known is None or not _asked_again(journal, known, row, node_key):
            raise TokenError(f"join token for {row.member} was used already: ask the operator for a new one")
        return known
    body: dict[str, object] = {"member": row.member, "role": row.role, "key_sha256": row.key_sha256, "at_ms": now_ms}
    body["certificate_sha256"] = hashlib.sha256(row.certificate).hexdigest()
    if row.hosts:
        body["hosts"] = list(row.hosts)
    with journal.transaction():
        journal.change("INSERT INTO used_tokens VALUES (?, ?, ?, ?)", (nonce, row.member, row.key_sha256, now_ms))
        journal.change(
            "INSERT INTO members VALUES (?, ?, ?, ?, ?, 0, ?) ON CONFLICT (member) DO UPDATE SET role = excluded.role, "
            "key_sha256 = excluded.key_sha256, certificate = excluded.certificate, "
            "enrolled_ms = excluded.enrolled_ms, hosts = excluded.hosts",
            (row.member, row.role, row.key_sha256, row.certificate, now_ms, " ".join(row.hosts)),
        )
        keep_certificate(journal, row.key_sha256, row.member, row.certificate, now_ms)
        _replace_node(journal, row.member, node_key)
        journal.append_entry("enrolled", body)
    return row


def _asked_again(journal: Journal, known: MemberRow, row: MemberRow, node_key: bytes) -> bool:
    """Return whether a member is still what ``row`` and ``node_key`` ask for."""
    node = find_node(journal, row.member)
    enrolled = (known.role, known.key_sha256, known.hosts, b"" if node is None else node.public_key)
    return enrolled == (row.role, row.key_sha256, row.hosts, node_key)


def renew_member(journal: Journal, identity: Identity, key_sha256: str, certificate: bytes, now_ms: int) -> MemberRow:
    """Record a new certificate over a member's present key in one transaction; return the member as it is then.

    Raises:
        AccessError, CertificateError: as :func:`check_standing`.
    """
    known = check_standing(find_member(journal, identity.member), identity, key_sha256)
    digest = hashlib.sha256(certificate).hexdigest()
    with journal.transaction():
        journal.change("UPDATE members SET certificate = ? WHERE member = ?", (certificate, identity.member))
        keep_certificate(journal, key_sha256, identity.member, certificate, now_ms)
        body = {"member": identity.member, "key_sha256": key_sha256, "certificate_sha256": digest, "at_ms": now_ms}
        journal.append_entry("renewed", body)
    return replace(known, certificate=certificate)


def revoke_member(journal: Journal, member: str, revoked: bool, now_ms: int) -> MemberRow:
    """Shut a member out, or let it in again, in one transaction; return the member as it is then.

    What it is already is not recorded again.

    Raises:
        RequestError: nobody of that name has enrolled.
    """
    known = find_member(journal, member)
    if known is None:
        raise RequestError(f"no member {member[:160]!r} has enrolled here: give the name as organisation/name")
    if known.revoked == revoked:
        return known
    with journal.transaction():
        journal.change("UPDATE members SET revoked = ? WHERE member = ?", (int(revoked), member))
        journal.append_entry("revoked", {"member": member, "revoked": revoked, "at_ms": now_ms})
    return replace(known, revoked=revoked)


def check_standing(row: MemberRow | None, identity: Identity, key_sha256: str) -> MemberRow:
    """Return the row of a member that may come in with this name, role and key.

    Raises:
        CertificateError: unknown member, or replaced key; AccessError: shut out.
    """
    if row is None or row.role != identity.role:
        raise CertificateError(f"{identity.uri} is not enrolled here: join with a token of this server")
    if row.revoked:
        raise AccessError(f"member {identity.member} is shut out of this federation")
    if row.key_sha256 != key_sha256:
        raise CertificateError(
            f"member {identity.member} has enrolled again with another key: this certificate is replaced"
        )
    return row


def keep_certificate(journal: Journal, key_sha256: str, member: str, certificate: bytes, now_ms: int) -> None:
    """Record a certificate that was issued, inside a transaction: signatures are checked with it for ever."""
    journal.change(
        "INSERT INTO certificates VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", (key_sha256, member, certificate, now_ms)
    )


def certificates_of(journal: Journal, key_sha256: str) -> list[bytes]:
    """Return every certificate (PEM) that was issued over a key, the oldest first."""
    query = "SELECT certificate FROM certificates WHERE key_sha256 = ? ORDER BY issued_ms"
    return [row["certificate"] for row in journal.rows(query, (key_sha256,))]


def list_certificates(journal: Journal, after: int, limit: int) -> list[CertificateRow]:
    """Return up to ``limit`` certificates with a number after ``after``, by number."""
    rows = journal.rows("SELECT rowid, * FROM certificates WHERE rowid > ? ORDER BY rowid LIMIT ?", (after, limit))
    return [CertificateRow(row["rowid"], row["key_sha256"], row["member"], row["certificate"]) for row in rows]


def all_certificates(journal: Journal) -> list[CertificateRow]:
    """Return every certificate that was issued, by number."""
    return list_certificates(journal, 0, -1)


def list_members(journal: Journal) -> list[MemberRow]:
    """Return every member, sorted."""
    return [_member(row) for row in journal.rows("SELECT * FROM members ORDER BY member")]


def find_member(journal: Journal, member: str) -> MemberRow | None:
    """Return one member, or None."""
    row = journal.row("SELECT * FROM members WHERE member = ?", (member,))
    return None if row is None else _member(row)


def list_nodes(journal: Journal) -> list[NodeRow]:
    """Return the nodes of all members, sorted by member."""
    query = "SELECT n.*, m.revoked, m.key_sha256 FROM nodes n JOIN members m USING (member) ORDER BY n.member"
    return [_node(row) for row in journal.rows(query)]


def find_node(journal: Journal, member: str) -> NodeRow | None:
    """Return the node of one member, or None."""
    query = "SELECT n.*, m.revoked, m.key_sha256 FROM nodes n JOIN members m USING (member) WHERE n.member = ?"
    row = journal.row(query, (member,))
    return None if row is None else _node(row)


def bind_node(journal: Journal, member: str, node_id: int) -> None:
    """Record Flower's id of a member's node.

    Raises:
        RequestError: the member has no node, or the id is bound to another member.
    """
    with journal.transaction():
        other = journal.row("SELECT member FROM nodes WHERE node_id = ? AND member <> ?", (str(node_id), member))
        if other is not None and node_id != 0:
            raise RequestError(f"node id {node_id} is bound to {other['member']} already")
        changed = journal.change("UPDATE nodes SET node_id = ? WHERE member = ?", (str(node_id), member))
        if changed != 1:
            raise RequestError(f"member {member[:160]!r} has no node to bind: it enrolled without a node key")


def add_traffic(journal: Journal, down: Iterable[tuple[str, int, int, int]]) -> None:
    """Add (member, delta bytes, snapshot bytes, head bytes) to the counters."""
    with journal.transaction():
        for member, deltas, snapshots, heads in down:
            journal.change(
                "INSERT INTO traffic VALUES (?, ?, ?, ?) ON CONFLICT (member) DO UPDATE SET "
                "down_deltas = down_deltas + excluded.down_deltas, "
                "down_snapshots = down_snapshots + excluded.down_snapshots, "
                "down_heads = down_heads + excluded.down_heads",
                (member, deltas, snapshots, heads),
            )


def _replace_node(journal: Journal, member: str, node_key: bytes) -> None:
    if not node_key:
        journal.change("DELETE FROM nodes WHERE member = ?", (member,))
        return
    owner = journal.row("SELECT member FROM nodes WHERE public_key = ?", (node_key,))
    if owner is not None and owner["member"] != member:
        raise RequestError("this node key belongs to another member: make a fresh one")
    journal.change(
        "INSERT INTO nodes (member, public_key) VALUES (?, ?) ON CONFLICT (member) DO UPDATE SET "
        "node_id = CASE public_key WHEN excluded.public_key THEN node_id ELSE '0' END, "
        "public_key = excluded.public_key",
        (member, node_key),
    )


def _member(row: sqlite3.Row) -> MemberRow:
    return MemberRow(
        member=row["member"],
        role=row["role"],
        key_sha256=row["key_sha256"],
        certificate=row["certificate"],
        revoked=bool(row["revoked"]),
        hosts=tuple(row["hosts"].split()),
    )


def _node(row: sqlite3.Row) -> NodeRow:
    return NodeRow(
        member=row["member"],
        public_key=row["public_key"],
        node_id=int(row["node_id"]),
        revoked=bool(row["revoked"]),
        key_sha256=row["key_sha256"],
    )
