"""Proving an egress log: its chain, and what the hub says that it received from this member.

Found are: a line that was changed, taken out or put in; an update that the hub holds and the log does not; one whose
sizes, digest, task, receipt or declared noise differ; and one with a receipt in the log that the hub does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from share_client.egress import START, read_egress
from share_client.link import HubLink
from share_client.member import ClientLayout, load_member
from share_core.errors import ConfigError
from share_proto.v1 import hub_pb2

_PAGE = 1000


@dataclass(frozen=True)
class Egress:
    """What left, for people and machines."""

    lines: list[dict[str, Any]]
    """The lines that were asked for, oldest first."""
    total: dict[str, int]
    """Bytes that left by event, over these lines."""
    problems: list[str]
    """What does not hold; empty if all does."""
    updates: int = 0
    """Updates that were compared with the hub's records."""


def look(layout: ClientLayout, since: datetime | None, link: HubLink | None = None) -> Egress:
    """Read and prove the log of a client directory; with ``link`` also compare it with the hub.

    Raises:
        ConfigError: the directory is not enrolled.
    """
    before = read_egress(layout.egress)
    updates = None
    if link is not None:
        updates = own_updates(link, load_member(layout).member)
        receipts = {one.update_id: link.get_upload(one.update_id).receipt for one in updates}
    raw = read_egress(layout.egress)
    problems = list(chain_problems(raw))
    lines = _parsed(raw)
    if updates is not None:
        problems += update_problems(lines, updates, receipts)
        problems += unknown_receipts(_parsed(before), updates)
    chosen = [line for line in lines if since is None or datetime.fromisoformat(str(line.get("time"))) >= since]
    total: dict[str, int] = {}
    for line in chosen:
        event = str(line.get("event"))
        total[event] = total.get(event, 0) + int(line.get("bytes", 0))
    return Egress(chosen, total, problems, len(updates or ()))


def own_updates(link: HubLink, member: str) -> list[hub_pb2.UpdateRecord]:
    """Return every update that the hub holds of this member, in ingest order."""
    found: list[hub_pb2.UpdateRecord] = []
    after = 0
    while True:
        page = link.list_updates(after, _PAGE).updates
        if not page:
            return [one for one in found if one.member == member]
        found += page
        after = page[-1].ingest_seq


def chain_problems(raw: Sequence[bytes]) -> Iterator[str]:
    """Yield where the chain of a log breaks."""
    previous = START
    for place, line in enumerate(raw, start=1):
        try:
            body = json.loads(line)
            number, named = body["number"], body["previous"]
        except (ValueError, KeyError, TypeError):
            yield f"line {place} of the egress log cannot be read"
        else:
            if number != place:
                yield f"line {place} of the egress log has number {number}: lines were taken out or put in"
            elif named != previous:
                yield f"line {place} of the egress log does not follow line {place - 1}: one of them was changed"
        previous = hashlib.sha256(line).hexdigest()


def update_problems(
    lines: Sequence[dict[str, Any]],
    updates: Sequence[hub_pb2.UpdateRecord],
    receipts: dict[str, hub_pb2.SubmitResponse],
) -> Iterator[str]:
    """Yield what the hub holds of this member that the log does not tell, or tells otherwise."""
    uploads: dict[str, list[dict[str, Any]]] = {}
    kept: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        chosen = {"upload": uploads, "receipt": kept}.get(str(line.get("event")))
        if chosen is not None:
            chosen.setdefault(str(line.get("update_id")), []).append(line)
    for record in updates:
        name = f"update {record.update_id}"
        sent = uploads.get(record.update_id, [])
        if min((line.get("offset", 1) for line in sent), default=1) != 0:
            yield f"{name}: the hub received it, and the egress log does not hold all of its bytes"
            continue
        says = record.bytes
        size = says.coefficients + says.directions + says.heads + says.envelope
        expected = (record.task_id, size, record.payload_sha256, record.privacy)
        for line in sent:
            got = tuple(line.get(key) for key in ("task", "payload_bytes", "payload_sha256", "privacy"))
            if got != expected or line.get("bytes") != size - line.get("offset", 0):
                yield f"{name}: line {line.get('number')} of the egress log says {got}, the hub received {expected}"
        receipt = receipts[record.update_id]
        for line in kept.get(record.update_id, []):
            if (line.get("ingest_seq"), line.get("entry_hash")) != (receipt.ingest_seq, receipt.entry_hash):
                yield f"{name}: line {line.get('number')} of the egress log has another receipt than the hub gives now"


def unknown_receipts(lines: Sequence[dict[str, Any]], updates: Sequence[hub_pb2.UpdateRecord]) -> Iterator[str]:
    """Yield the updates that the hub has acknowledged and does not list."""
    known = {record.update_id for record in updates}
    for name in dict.fromkeys(str(line.get("update_id")) for line in lines if line.get("event") == "receipt"):
        if name not in known:
            yield f"update {name}: the egress log holds a receipt, and the hub does not list it"


def read_since(text: str | None) -> datetime | None:
    """Read a moment in ISO 8601; without a zone it is local time.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise ConfigError(f"--since {text!r}: expected a moment such as 2026-11-29 or 2026-11-29T08:30") from error


def print_egress(found: Egress, say: Callable[[str], None]) -> None:
    """Print what left as a table, then the problems."""
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("time", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("to", overflow="fold")
    table.add_column("SHA-256", no_wrap=True)
    for line in found.lines:
        digest = str(line.get("payload_sha256") or line.get("sha256") or line.get("entry_hash") or "")
        moment = f"{datetime.fromisoformat(str(line.get('time'))).astimezone():%m-%d %H:%M:%S}"
        table.add_row(moment, _what(line), str(line.get("bytes", 0)), str(line.get("to", "")), digest[:12])
    Console().print(table)
    for event, count in sorted(found.total.items()):
        if count:
            say(f"{event}: {decimal(count)}")
    for problem in found.problems:
        say(f"problem: {problem}")


def _what(line: dict[str, Any]) -> str:
    """Return one line's subject in words."""
    event = line.get("event")
    if event == "call":
        return str(line.get("method"))
    if event == "upload":
        resumed = f" from byte {line['offset']}" if line.get("offset") else ""
        noise = ", with noise" if line.get("privacy") else ""
        return f"update of {line.get('task')}, {len(line.get('tensors', ()))} tensors{resumed}{noise}"
    if event == "receipt":
        return f"(receipt: update number {line.get('ingest_seq')})"
    return f"Flower {line.get('request') or '(continued)'}"


def _parsed(raw: Sequence[bytes]) -> list[dict[str, Any]]:
    """Return the lines that can be read; the chain tells of the others."""
    found = []
    for line in raw:
        try:
            body = json.loads(line)
        except ValueError:
            continue
        if isinstance(body, dict):
            found.append(body)
    return found
