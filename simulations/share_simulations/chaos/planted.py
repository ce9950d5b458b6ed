"""Hubs with a planted bug each: every campaign is shown to catch them.

A planted bug replaces one step of the honest hub and leaves the rest alone. :func:`write_hub` makes the script that
:class:`share_server.local.LocalHub` runs in place of the hub.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from share_proto.v1 import hub_pb2
from share_server.hub import convert, merging
from share_server.hub.access import CALLER
from share_server.hub.intake import Intake
from share_server.hub.tensor_service import HubService
from share_server.store import updates, versions
from share_server.store.anchor import Mark
from share_server.store.journal import Journal
from share_server.store.records import Merging, UpdateRow
from share_server.store.store import Store
from share_server.store.updates import accept_update, accept_updates, find_update

_LATER_S = 0.4
_TRANSACTIONS = 40
_tasks: set[asyncio.Task[Any]] = set()


def write_hub(bug: str, folder: Path) -> Path:
    """Write the script of the hub with this bug into ``folder`` and return its path."""
    script = folder / f"hub_{bug}.py"
    script.write_text(f"from share_simulations.chaos.planted import main\nmain({bug!r})\n")
    return script


def main(bug: str) -> None:
    """Be the hub of the directory named on the command line, with a planted bug."""
    from share_server.hub import __main__

    BUGS[bug]()
    sys.exit(__main__.main(sys.argv[1:]))


def replace_step(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute; an attribute that is not there means that the bug is not planted."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner.__name__} has no {name}: the planted bug does not fit this hub any more")
    setattr(owner, name, value)


async def _replay(messages: list[hub_pb2.SubmitRequest]) -> AsyncIterator[hub_pb2.SubmitRequest]:
    for message in messages:
        yield message


def _background(work: Any) -> None:
    task = asyncio.ensure_future(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def _ack_before_row() -> None:
    """The receipt leaves when the bytes are in memory; what is durable comes a moment later."""
    numbers = iter(range(1, 2**31))

    async def submit(self: Any, request_iterator: Any, context: Any) -> hub_pb2.SubmitResponse:
        await context.send_initial_metadata(())  # the client waits for it before it sends the payload
        messages = [message async for message in request_iterator]
        caller = CALLER.get()

        async def later() -> None:
            await asyncio.sleep(_LATER_S)
            await self._intake.receive(caller, _replay(messages))
            self._loop.wake()

        _background(later())
        return hub_pb2.SubmitResponse(update_id=messages[0].header.update_id, ingest_seq=next(numbers))

    replace_step(HubService, "Submit", submit)


def _no_dedupe() -> None:
    """An update that is known already is taken once more."""
    honest = Intake.receive

    async def receive(self: Intake, *arguments: Any) -> Any:
        row, duplicate = await honest(self, *arguments)
        if duplicate:
            again = replace(row.new, update_id=secrets.token_hex(16), sequence=0)
            await self._store.do(lambda journal: accept_update(journal, again, row.received_ms))
        return row, duplicate

    replace_step(Intake, "receive", receive)


def _two_receipts() -> None:
    """A resend is answered with another place in the journal than the first time."""
    honest = convert.receipt

    def receipt(row: Any, duplicate: bool) -> hub_pb2.SubmitResponse:
        answer = honest(row, duplicate)
        answer.ingest_seq += duplicate
        return answer

    replace_step(convert, "receipt", receipt)


def _row_before_payload() -> None:
    """Rows are committed before their payloads have their names."""

    async def commit_group(self: Store, group: Any) -> Any:
        news, now_ms = [ready.new for ready in group], max(ready.now_ms for ready in group)
        answers = await self.do(lambda journal: accept_updates(journal, news, now_ms))
        await asyncio.sleep(_LATER_S)
        await self.io(lambda: self.blobs.adopt([ready.staged for ready in group]))
        return answers

    replace_step(Store, "_commit_group", commit_group)


def _lazy_commit() -> None:
    """Several transactions share one commit, and nobody waits for it: what is read back meanwhile looks durable."""
    pending = 0

    @contextmanager
    def transaction(self: Any) -> Iterator[None]:
        nonlocal pending
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
        yield
        self._count += 1
        self.change("UPDATE meta SET value = ? WHERE name = 'transactions'", (str(self._count),))
        pending += 1
        if pending >= _TRANSACTIONS or self.row("SELECT 1 FROM updates") is None:
            self._db.execute("COMMIT")
            self._anchor.write(Mark(self._count, *self._last))
            pending = 0

    replace_step(Journal, "transaction", transaction)


def _merged_twice() -> None:
    """A merged update is found waiting once more, and the merge does not look at its state."""
    honest, again = updates.list_accepted, set[str]()

    def list_accepted(journal: Journal, most: int) -> list[UpdateRow]:
        rows = honest(journal, most)
        newest = journal.row("SELECT update_id FROM updates WHERE state = 'MERGED' ORDER BY ingest_seq DESC LIMIT 1")
        if not rows or newest is None or newest[0] in again:
            return rows
        again.add(newest[0])
        merged = find_update(journal, newest[0])
        return rows if merged is None else [merged, *rows]

    def record(journal: Journal, version: int, one: Merging) -> None:
        journal.change(
            "UPDATE updates SET state = 'MERGED', version = ?, relative_error = ? WHERE update_id = ?",
            (version, one.relative_error, one.update_id),
        )
        journal.change(
            "UPDATE tasks SET updates = updates + 1, updated_version = ?, "
            "created_version = CASE created_version WHEN 0 THEN ? ELSE created_version END WHERE task_id = ?",
            (version, version, one.task_id),
        )

    replace_step(merging, "list_accepted", list_accepted)
    replace_step(versions, "_record_merging", record)


BUGS: Mapping[str, Callable[[], None]] = {
    "ack_before_row": _ack_before_row,
    "row_before_payload": _row_before_payload,
    "lazy_commit": _lazy_commit,
    "no_dedupe": _no_dedupe,
    "two_receipts": _two_receipts,
    "merged_twice": _merged_twice,
}
"""Planted bugs by name; random kills under load must show every one of them."""
