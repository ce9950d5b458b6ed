"""A hub that was restored from a backup: what it no longer holds counts as never merged, and is trained again.

A restored hub is at an older version than its clients, which refuse it until their operators remove the cached
versions. So the hub is asked whenever a session begins without any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from share_client.link import HubLink, patiently
from share_client.records import RESTORED, Head, Records
from share_client.session_log import SessionLog
from share_core.errors import FedshareError, UnknownUpdateError
from share_proto.v1 import hub_pb2


def forget_lost(
    records: Records,
    link: HubLink,
    version: int,
    stop: threading.Event,
    on_wait: Callable[[FedshareError], None],
    log: SessionLog,
) -> None:
    """Ask the hub after the newest merge of every task, and forget what it does not hold any more.

    Args:
        records: of all tasks.
        link: to the hub.
        version: its newest version; what the histories say of later ones is of versions that it has lost.
        stop: ends the waiting for a hub that is away.
        on_wait: is told why it waits.
        log: is told of every task that a merge was lost of.
    """
    lost = []
    for record in records.all():
        for head in reversed(record.heads):
            if _is_held(records, record.task, head, link, stop, on_wait):
                break
            lost.append((record.task, head))
    stands = min([version, *(head.version - 1 for _, head in lost)])
    for record in records.all():
        if max((line.get("version", 0) for line in records.history(record.task)), default=0) > stands:
            records.add_history(record.task, {"event": RESTORED, "task": record.task, "version": stands})
    for task, head in lost:  # last: a crash before leaves what all of this is found out by again
        records.lost(task, head.version)
        log.write("lost", task=task, version=head.version)


def _is_held(
    records: Records,
    task: str,
    head: Head,
    link: HubLink,
    stop: threading.Event,
    on_wait: Callable[[FedshareError], None],
) -> bool:
    """Whether this training is still in the hub's hands; True where that cannot be asked.

    One that it has yet to merge, or that was forgotten on purpose, is; one that it merged anew gets its new version.
    """
    if not head.update_id:
        return True
    try:
        found = patiently(lambda: link.get_update(head.update_id), stop, on_wait)
    except UnknownUpdateError:
        return False
    if found is not None and found.state == hub_pb2.UPDATE_STATE_MERGED and found.version != head.version:
        records.moved(task, head.version, found.version)
    return found is None or found.state != hub_pb2.UPDATE_STATE_REFUSED
