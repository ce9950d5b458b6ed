"""``share-server revoke``: shut a member out, or let it in again, whether the hub runs or not."""

from __future__ import annotations

import contextlib
import os

from share_core.errors import ConfigError
from share_core.spec_file import read_spec
from share_proto.v1 import hub_pb2
from share_server.config import read_config
from share_server.hub.clock import now_ms
from share_server.layout import Layout
from share_server.operations.reading import is_running
from share_server.operator import ask, operator_stub
from share_server.store.journal import Journal
from share_server.store.members import revoke_member
from share_server.store.store import lock_directory


def revoke(layout: Layout, member: str, undo: bool = False) -> None:
    """Shut out ``organisation/name``; durable when this returns.

    A running hub is told, and ends the member's open calls at once; of a stopped one the journal is changed. With
    ``undo`` the member is let in again.

    Raises:
        ConfigError: the directory is none of a server, or nobody was ever enrolled in it.
        RequestError: nobody of that name has enrolled.
        FedshareError: what the hub answers, or the journal.
    """
    config = read_config(layout.config)
    if is_running(layout):
        request = hub_pb2.RevokeRequest(member=member, undo=undo)
        with operator_stub(layout, config) as hub:
            ask(hub.Revoke, request, config.local_hub_address)
        return
    path = layout.store / "journal.db"
    if not path.exists():
        raise ConfigError(f"{layout.root} has no store yet: nobody has enrolled")
    lock = lock_directory(layout.store)
    try:
        with contextlib.closing(Journal(path, read_spec(layout.space).space_id)) as journal:
            revoke_member(journal, member, not undo, now_ms())
    finally:
        os.close(lock)
