"""The checks of a verification, from the journal's pages to every payload's bytes. None stops at a problem."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from share_core.errors import FedshareError, StorageError
from share_core.identity import ManifestVerifier
from share_core.types import SpaceSpec
from share_server.layout import Layout
from share_server.operations.backup import MARKER
from share_server.operations.reading import ReadJournal, Told
from share_server.operations.report import Report
from share_server.operations.signatures import INVALID, UNSIGNED, SignatureChecker
from share_server.store.anchor import START, Anchor, Mark
from share_server.store.blobs import storage
from share_server.store.journal import Journal, entry_hash
from share_server.store.members import all_certificates, list_members
from share_server.store.pages import PageSums
from share_server.store.privacy import privacy_problems
from share_server.store.records import UpdateRow, UpdateState, VersionRow
from share_server.store.recovery import Entries, all_updates, needed_payloads, row_problems
from share_server.store.schema import SCHEMA_VERSION
from share_server.store.updates import sharing_to_text
from share_server.store.versions import find_task, head_version, list_versions

_MOST_NAMED = 20
"""Most unsigned updates that a note names."""


_REASONED = {UpdateState.REFUSED: "refused", UpdateState.QUARANTINED: "quarantined"}
"""States with a reason, and the entries that say it."""


@dataclass(frozen=True)
class Rows:
    """What the journal holds, as far as it could be read."""

    entries: Entries
    """The hash chain."""
    updates: list[UpdateRow]
    """In ingest order."""
    versions: list[VersionRow]
    """From version 1."""
    head: int
    """The newest version."""

    @cached_property
    def policy_of_format_1(self) -> dict[str, Any] | None:
        """The policy that was written down when versions of format 1 were signed, or None."""
        return next((body["policy"] for kind, body, _ in self.entries.values() if kind == "signed"), None)


def check_pages(folder: Path, report: Report) -> Mark:
    """Compare the copied journal file with its page sums; return what its anchor promises."""
    sums, mark = PageSums(folder / "journal.db"), START
    with report.noting("anchor"):
        if (folder / "anchor").exists():
            anchor = Anchor(folder / "anchor")
            anchor.close()
            mark = anchor.mark
    if mark.count:
        with report.noting("page sums"):
            sums.load()
            report.problems += list(sums.problems())
    return mark


def check_journal(journal: ReadJournal, mark: Mark, spec: SpaceSpec, report: Report) -> Rows:
    """Check the database, the chain, and the rows against the chain."""
    report.format = journal.format
    if journal.format < SCHEMA_VERSION:
        report.notes.append(
            f"the store has format {journal.format}; the next start of the hub brings it to format {SCHEMA_VERSION}"
        )
    with report.noting("journal"):
        found = [str(row[0]) for row in journal.rows("PRAGMA integrity_check(100)")]
        report.problems += [f"the journal is damaged: {line}" for line in found if line != "ok"]
        loose = journal.rows("PRAGMA foreign_key_check")
        report.problems += [f"a row of {row[0]} refers to a row of {row[2]} that is gone" for row in loose]
    with report.noting("space"):
        owner = journal.meta("space_id")
        if owner != spec.space_id:
            report.problems.append(f"the store belongs to space {owner}, but space.toml describes {spec.space_id}")
    entries: dict[int, tuple[str, dict[str, Any], str]] = {}
    with report.noting("hash chain"):
        report.problems += list(_read_chain(journal, entries))
    with report.noting("anchor"):
        report.problems += list(_anchor_problems(journal, mark, entries))
    report.entries = len(entries)
    return _read_rows(journal, entries, report)


def _read_rows(journal: ReadJournal, entries: Entries, report: Report) -> Rows:
    updates: list[UpdateRow] = []
    versions: list[VersionRow] = []
    head = 0
    with report.noting("updates"):
        updates = all_updates(journal)
        if [row.ingest_seq for row in updates] != list(range(1, len(updates) + 1)):
            report.problems.append("the updates are not numbered 1, 2, 3 and so on: some are gone or were inserted")
    with report.noting("versions"):
        head = head_version(journal)
        highest = journal.row("SELECT coalesce(max(version), 0) FROM versions")
        versions = list_versions(journal, 0, max(head, highest[0] if highest else 0))
    with report.noting("rows and chain"):
        report.problems += list(row_problems(entries, updates, versions, head))
    with report.noting("other rows and chain"):
        report.problems += list(_other_row_problems(journal, entries, updates, versions))
    with report.noting("privacy ledger"):
        report.problems += list(privacy_problems(journal, [(kind, body) for kind, body, _ in entries.values()]))
    report.updates, report.versions = len(updates), len(versions)
    return Rows(entries, updates, versions, head)


def _read_chain(journal: ReadJournal, entries: dict[int, tuple[str, dict[str, Any], str]]) -> Iterator[str]:
    """Fill ``entries``; yield where the chain breaks, going on from what is stored behind the break."""
    previous, expected = bytes(32), 1
    for row in journal.rows("SELECT * FROM entries ORDER BY seq"):
        if row["seq"] != expected or row["previous"] != previous:
            yield f"the hash chain breaks before entry {row['seq']} (expected entry {expected})"
        digest = entry_hash(row["previous"], row["kind"], row["body"])
        if row["hash"] != digest:
            yield f"entry {row['seq']} of the hash chain was changed"
        try:
            entries[row["seq"]] = (row["kind"], json.loads(row["body"]), row["hash"].hex())
        except ValueError:
            yield f"entry {row['seq']} of the hash chain cannot be read"
        previous, expected = row["hash"], row["seq"] + 1


def _anchor_problems(journal: ReadJournal, mark: Mark, entries: Entries) -> Iterator[str]:
    count = int(journal.meta("transactions") or 0)
    if count < mark.count:
        yield f"the journal has {count} transactions, but {mark.count} were promised: its end is lost"
    elif mark.count and count > mark.count + 1:
        yield f"the journal has {count} transactions, but its anchor says {mark.count}: it is of another time"
    found = entries[mark.entries][2] if mark.entries in entries else bytes(32).hex() if not mark.entries else ""
    if found != mark.hash.hex():
        yield f"entry {mark.entries} of the hash chain is not the one that was promised: the journal's end was changed"
    if journal.format >= 2 and count > 1 and not mark.count:
        yield "the journal's anchor (store/anchor) is gone: whether its end is complete cannot be told"


def _other_row_problems(
    journal: ReadJournal, entries: Entries, updates: list[UpdateRow], versions: list[VersionRow]
) -> Iterator[str]:
    """Compare what a start of the hub does not: refusals, originals, sharing, members, collection, task counters."""
    said: dict[str, dict[str, dict[str, Any]]] = {}
    before = 0
    for kind, body, _ in entries.values():
        key = body.get("update_id") or body.get("task_id") or body.get("member") or ""
        said.setdefault(kind, {})[key] = body
        before = max(before, body["before"]) if kind == "collected" else before
    originals = said.get("original", {})
    for row in updates:
        name = row.new.update_id
        if row.state in _REASONED and said.get(_REASONED[row.state], {}).get(name, {}).get("reason") != row.reason:
            yield f"update {name} was {_REASONED[row.state]} for another reason than its row says"
        if row.state is UpdateState.FORGOTTEN:
            if row.original_sha256 is not None:
                yield f"update {name} is forgotten and has its original still"
        elif originals.get(name, {}).get("sha256") != row.original_sha256:
            yield f"update {name} has another original than was chained"
    for version in versions:
        if version.collected != (version.version < before):
            yield f"version {version.version} is {'' if version.collected else 'not '}collected, which was not chained"
    for kind, body, _ in entries.values():
        for number, digest in body["versions"].items() if kind == "signed" else ():
            if int(number) > len(versions) or versions[int(number) - 1].manifest.sha256 != digest:
                yield f"version {number} has another manifest than was chained"
    yield from _member_problems(journal, said.get("enrolled", {}), said.get("revoked", {}))
    yield from _certificate_problems(journal, entries)
    yield from _task_problems(journal, updates, said.get("shared", {}))


def _member_problems(
    journal: ReadJournal, enrolled: Mapping[str, dict[str, Any]], revoked: Mapping[str, dict[str, Any]]
) -> Iterator[str]:
    members = list_members(journal)
    for member in members:
        body = enrolled.get(member.member, {})
        if (body.get("role"), body.get("key_sha256")) != (member.role, member.key_sha256):
            yield f"member {member.member} has another key or role than it enrolled with"
        if tuple(body.get("hosts", ())) != member.hosts:
            yield f"member {member.member} may serve under other names than it enrolled with"
        if revoked.get(member.member, {}).get("revoked", False) != member.revoked:
            yield f"member {member.member} is {'' if member.revoked else 'not '}shut out, which was not chained"
    if len(members) != len(enrolled):
        yield f"the journal has {len(members)} members, but {len(enrolled)} were enrolled"


def _certificate_problems(journal: ReadJournal, entries: Entries) -> Iterator[str]:
    """Compare each member's certificate with the last one that was chained, by its enrolment or a renewal."""
    last = {
        body["member"]: body.get("certificate_sha256")  # enrolments of format 2 and before do not tell it
        for kind, body, _ in entries.values()
        if kind in {"enrolled", "renewed"}
    }
    for member in list_members(journal):
        digest = hashlib.sha256(member.certificate).hexdigest()
        if last.get(member.member) not in {None, digest}:
            yield f"member {member.member} has another certificate than was chained"


def _task_problems(
    journal: ReadJournal, updates: list[UpdateRow], shared: Mapping[str, dict[str, Any]]
) -> Iterator[str]:
    merged: dict[str, list[int]] = {}
    for row in updates:
        own = merged.setdefault(row.new.task_id, [])
        if row.version:
            own.append(row.version)
    for task_id, own in merged.items():
        task = find_task(journal, task_id)
        if task is None:
            yield f"task {task_id} has updates and no row"
            continue
        expected = (len(own), min(own, default=0), max(own, default=0))
        if (task.updates, task.created_version, task.updated_version) != expected:
            yield f"task {task_id} counts other updates or versions than its updates give"
        body = shared.get(task_id)
        terms = {"open": task.sharing.open, "organisations": sorted(task.sharing.organisations)}
        if (body is not None) != bool(sharing_to_text(task.sharing)) or any(
            body[key] != value for key, value in terms.items() if body is not None
        ):
            yield f"task {task_id} is shared on other terms than were chained"


def check_manifests(layout: Layout, versions: list[VersionRow], report: Report, told: Told) -> None:
    """Check the signature of every manifest against the certificate of this federation's signer."""
    signed = [row for row in versions if row.manifest.body]
    if not signed:
        return
    with report.noting("manifests"):
        verifier = ManifestVerifier(
            layout.ca_cert.read_bytes(), layout.signing_certificate.read_bytes(), datetime.now(UTC)
        )
        for done, row in enumerate(signed, start=1):
            try:
                verifier.read(row.manifest)
            except FedshareError as error:
                report.problems.append(f"version {row.version}: {error}")
            told("signatures", done, len(signed))


def check_signatures(
    layout: Layout, journal: Journal, space_id: str, updates: list[UpdateRow], report: Report, told: Told
) -> None:
    """Check the signature of every update. Unsigned are those of format 2 and before, and none after them."""
    with report.noting("signatures of updates"):
        checker = SignatureChecker(layout.ca_cert.read_bytes(), space_id, all_certificates(journal))
        unsigned: list[str] = []
        for done, row in enumerate(updates, start=1):
            checked = checker.check(row.new)
            if checked.signature == INVALID:
                report.problems.append(f"update {row.new.update_id}: {checked.problem}")
            if checked.signature == UNSIGNED:
                unsigned.append(row.new.update_id)
                if report.signatures:
                    report.problems.append(f"update {row.new.update_id} is not signed, and earlier ones are")
            else:
                report.signatures += 1
            told("signatures of updates", done, len(updates))
        if unsigned:
            report.notes.append(
                f"{len(unsigned)} updates were taken by a release that did not sign: who sent them is what the journal "
                f"says; they are {', '.join(unsigned[:_MOST_NAMED])}{' ...' if unsigned[_MOST_NAMED:] else ''}"
            )


def check_payloads(folder: Path, rows: Rows | None, report: Report, told: Told) -> None:
    """Re-hash every payload file; find those that are missing, damaged, or needed by nobody.

    Without ``rows``, where the journal cannot be read, every file is compared with its name and nothing else.
    """
    needed = {} if rows is None else needed_payloads(rows.updates, rows.versions)
    files = sorted((folder / "blobs").glob("*/*"))
    seen: dict[str, int] = {}
    for done, path in enumerate(files, start=1):
        with report.noting(f"payload {path.name}"):
            with storage("reading it"), path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
            report.payloads += 1
            report.bytes += size
            seen[path.name] = size
            wrong = digest != path.name or path.parent.name != path.name[:2]
            expected = needed.get(path.name, size)
            if rows is not None and path.name not in needed:
                report.orphans.append(path.name)
            elif wrong or size != expected:
                report.problems.append(
                    f"payload {path.name} is damaged: expected {expected} bytes of that digest, "
                    f"got {size} bytes of {digest}"
                )
        told("payloads", done, len(files))
    owners = {} if rows is None else _owners(rows)
    for digest in needed:
        if digest not in seen:
            report.problems.append(f"payload {digest} of {owners.get(digest, 'the store')} is missing")


def _owners(rows: Rows) -> dict[str, str]:
    found: dict[str, str] = {}
    for update in rows.updates:
        found[update.new.sha256] = f"update {update.new.update_id}"
        if update.original_sha256 is not None:
            found[update.original_sha256] = f"the original of update {update.new.update_id}"
    for version in rows.versions:
        found[version.delta_sha256] = f"the step to version {version.version}"
        if version.snapshot_sha256 is not None:
            found[version.snapshot_sha256] = f"version {version.version}"
    return found


def check_marker(layout: Layout, rows: Rows, report: Report) -> None:
    """Compare the store of a backup with what its marker says it holds."""
    path = layout.root / MARKER
    if not path.exists():
        return
    with report.noting(MARKER):
        said = json.loads(path.read_text("utf-8"))
        last = rows.entries.get(said["entries"])
        if said["entries"] and (last is None or last[2] != said["hash"]):
            raise StorageError(
                f"this backup was made with {said['entries']} entries of another hash chain: its store was exchanged"
            )
