"""Clients with a planted bug each: the campaign ``share-sim chaos client`` is shown to catch them.

A planted bug replaces one step of the honest client and leaves the rest alone. It is planted in the forked process of
one life, so the next life can be an honest one.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from share_client.outbox import Entry, Outbox
from share_client.sending import Sender
from share_core.durable import TEMPORARY
from share_proto.v1 import hub_pb2


@dataclass(frozen=True)
class ClientBug:
    """One planted bug."""

    plant: Callable[[], None]
    """Break this process."""
    what: str
    """What is wrong, in words."""


def replace_step(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute; an attribute that is not there means that the bug is not planted."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner.__name__} has no {name}: the planted bug does not fit this client any more")
    setattr(owner, name, value)


def _removed_before_acknowledgement() -> None:
    honest, remove = cast(Any, Sender._send), Outbox.remove
    entries: Any = Entry
    read_payload, read_head = Entry.read_payload, Entry.read_head

    def send(sender: Any, entry: Entry) -> Entry | None:
        payload, head = read_payload(entry), read_head(entry)
        box = sender._outbox
        if not sender._signer.has_signed(entry.submission):
            entry = box.sign(entry, sender._signer.sign(entry.submission))
        remove(box, entry)
        replace_step(entries, "read_payload", lambda entry: payload)
        replace_step(entries, "read_head", lambda entry: head)
        box.acknowledge = lambda entry, receipt: entry
        box.remove = lambda entry: None
        sent = honest(sender, entry)
        # What is gone from the disk lives on in memory until it is merged.
        while sent is not None and sender._link.get_update(entry.update_id).state == hub_pb2.UPDATE_STATE_ACCEPTED:
            if sender._stop.wait(0.02):
                return None
        return cast("Entry | None", sent)

    replace_step(Sender, "_send", send)


def _recorded_after_removal() -> None:
    honest, remove = cast(Any, Sender._keep), Outbox.remove
    entries: Any = Entry

    def keep(sender: Any, entry: Entry, record: hub_pb2.UpdateRecord) -> None:
        head = entry.read_head()
        remove(sender._outbox, entry)
        replace_step(entries, "read_head", lambda entry: head)
        sender._outbox.remove = lambda entry: None
        try:
            honest(sender, entry, record)
        finally:
            del sender._outbox.remove

    replace_step(Sender, "_keep", keep)


def _new_id_at_each_start() -> None:
    honest = cast(Any, Outbox.__init__)

    def begin(box: Any, directory: Path, *arguments: Any) -> None:
        honest(box, directory, *arguments)
        for entry in box.entries():
            header = json.loads((entry.directory / "header.json").read_bytes())
            header["submission"]["update_id"] = fresh = uuid.uuid4().hex
            (entry.directory / "header.json").write_text(json.dumps(header))
            for name in ("signature.json", "receipt.json"):
                (entry.directory / name).unlink(missing_ok=True)
            entry.directory.rename(directory / fresh)

    replace_step(Outbox, "__init__", begin)


def _written_in_place() -> None:
    honest, module = cast(Any, Outbox._put), sys.modules[Outbox.__module__]

    def put(box: Any, *arguments: Any) -> Entry:
        replace_step(module, "TEMPORARY", "")
        try:
            return cast(Entry, honest(box, *arguments))
        finally:
            replace_step(module, "TEMPORARY", TEMPORARY)

    replace_step(Outbox, "_put", put)


def _unsent_is_dropped() -> None:
    honest = cast(Any, Outbox.__init__)

    def begin(box: Any, directory: Path, *arguments: Any) -> None:
        honest(box, directory, *arguments)
        for entry in box.entries():
            if not entry.submission.signature:
                box.remove(entry)

    replace_step(Outbox, "__init__", begin)


BUGS: Mapping[str, ClientBug] = {
    "removed_before_acknowledgement": ClientBug(
        _removed_before_acknowledgement, "an update leaves the outbox before the hub has acknowledged it"
    ),
    "recorded_after_removal": ClientBug(
        _recorded_after_removal, "a merge is recorded after its update has left the outbox"
    ),
    "new_id_at_each_start": ClientBug(_new_id_at_each_start, "every start gives what waits a new update id"),
    "written_in_place": ClientBug(_written_in_place, "an update has its name in the outbox before it is whole"),
    "unsent_is_dropped": ClientBug(_unsent_is_dropped, "a start throws away what was never sent"),
}
"""Planted bugs by name; kills at random moments must show every one of them."""
