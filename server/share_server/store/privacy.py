"""What the published updates of each task have spent, in the journal.

An update that declares noise on its coefficients is counted in the transaction that commits the version it is merged
in: there is no version without its spend and no spend without its version. The authority is the hash chain: its entries
say which update declared what and which version holds which update, so that the table can be compared with it and made
anew. Updates that were forgotten later stay counted, since their noise has been published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from share_core.privacy import Declaration, PrivacyLedger, declaration_from_text, read_ledger_events, spend
from share_server.store.journal import Journal


def read_privacy(journal: Journal) -> dict[str, PrivacyLedger]:
    """Return the ledger of every task that has one."""
    rows = journal.rows("SELECT task_id, events, delta FROM privacy")
    return {row["task_id"]: read_ledger_events(row["events"], row["delta"]) for row in rows}


def record_spend(journal: Journal, updates: Iterable[str]) -> None:
    """Count updates that the running transaction merges."""
    for name in updates:
        row = journal.row("SELECT task_id, privacy FROM updates WHERE update_id = ? AND privacy <> ''", (name,))
        if row is not None:
            _spend(journal, row["task_id"], declaration_from_text(row["privacy"]))


def _spend(journal: Journal, task_id: str, declared: Declaration | None) -> None:
    known = journal.row("SELECT events, delta FROM privacy WHERE task_id = ?", (task_id,))
    before = None if known is None else read_ledger_events(known["events"], known["delta"])
    after = spend(before, declared)
    if after is not None and after != before:
        _write(journal, task_id, after)


def restore_privacy(journal: Journal) -> None:
    """Make every ledger anew from the hash chain, inside the running transaction."""
    rows = journal.rows("SELECT kind, body FROM entries WHERE kind IN ('update', 'version') ORDER BY seq")
    journal.change("DELETE FROM privacy")
    for task_id, ledger in chained_privacy((row["kind"], json.loads(row["body"])) for row in rows).items():
        _write(journal, task_id, ledger)


def chained_privacy(entries: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, PrivacyLedger]:
    """Return the ledgers that (kind, body) of the chain's entries give; an update in several versions counts once."""
    waiting: dict[str, tuple[str, Declaration | None]] = {}
    ledgers: dict[str, PrivacyLedger] = {}
    for kind, body in entries:
        if kind == "update" and "privacy" in body:
            waiting[body["update_id"]] = (body["task_id"], declaration_from_text(body["privacy"]))
        for name in body.get("updates", ()) if kind == "version" else ():
            task_id, declared = waiting.pop(name, ("", None))
            after = spend(ledgers.get(task_id), declared)
            if after is not None:
                ledgers[task_id] = after
    return ledgers


def privacy_problems(journal: Journal, entries: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the tasks whose ledger is not what the chain gives."""
    expected, stored = chained_privacy(entries), read_privacy(journal)
    epsilons = {row["task_id"]: row["epsilon"] for row in journal.rows("SELECT task_id, epsilon FROM privacy")}
    for task_id in sorted(expected.keys() | stored.keys()):
        wanted, found = expected.get(task_id), stored.get(task_id)
        if wanted != found or (wanted is not None and epsilons[task_id] != wanted.epsilon):
            said = "none" if found is None else f"{epsilons[task_id]:.6g}"
            yield (
                f"task {task_id} has spent epsilon {0.0 if wanted is None else wanted.epsilon:.6g} by the hash chain, "
                f"but its privacy ledger says {said}; share-server rebuild makes the ledger anew"
            )


def _write(journal: Journal, task_id: str, ledger: PrivacyLedger) -> None:
    journal.change(
        "INSERT INTO privacy (task_id, events, delta, epsilon) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (task_id) DO UPDATE SET events = excluded.events, delta = excluded.delta, "
        "epsilon = excluded.epsilon",
        (task_id, ledger.events_to_text(), ledger.delta, ledger.epsilon),
    )
