"""The thin ServerApp: asks the hub for leases, hands each to its node as one Flower message, tells the hub the replies.

It holds no state that matters. A lost reply or a lost ServerApp costs a wait at the hub, never an update.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from share_core import lifeline
from share_core.errors import ConfigError, RequestError, UnavailableError
from share_core.lease import LEASE_RECORD, MESSAGE_TYPE, REPORT_RECORD, Lease, report_from_record
from share_proto.v1 import fleet_pb2
from share_server.config import read_config
from share_server.fleet.files import FleetFiles
from share_server.fleet.hub_link import HubLink
from share_server.fleet.superlink import SERVER_DIRECTORY
from share_server.hub import log
from share_server.layout import Layout

# Flower's own processes do not pass the supervisor's death on.
lifeline.arm()

app = ServerApp()

POLL_SECONDS = 0.5
"""Pause between two rounds."""

RETRY_SECONDS = 1.0
"""Pause after the hub did not answer."""

REPLY_GRACE_SECONDS = 120.0
"""A reply may come this much after the deadline of its lease: the last update of a lease is finished, not cut."""

SHORTEST_TTL_SECONDS = 60.0
"""Life of the message of a lease that is nearly over."""

_UNREADABLE = 6
"""Error code told to the hub for a reply that is not one of ours."""


@dataclass(frozen=True)
class Sent:
    """A lease on its way."""

    lease_id: str
    """The hub's id."""
    give_up_at: float
    """Monotonic time after which no reply is expected."""


class Dispatcher:
    """One round after another between the Grid and the hub."""

    def __init__(self, grid: Grid, link: HubLink) -> None:
        self._grid = grid
        self._link = link
        self._sent: dict[str, Sent] = {}
        self._outcomes: list[fleet_pb2.LeaseOutcome] = []

    def round(self) -> None:
        """Collect replies, tell the hub, push what it hands out.

        Raises:
            UnavailableError: the hub does not answer; outcomes are kept for the next round.
        """
        self._collect()
        online = [int(node.node_id) for node in self._grid.get_nodes()]
        answer = self._link.dispatch(fleet_pb2.DispatchRequest(online_node_ids=online, outcomes=self._outcomes))
        self._outcomes.clear()
        for lease in answer.leases:
            self._push(lease)

    def _push(self, told: fleet_pb2.Lease) -> None:
        lease = Lease(
            told.lease_id, told.node_id, told.space_id, told.hub_address, told.deadline_unix_ms, told.max_updates
        )
        remaining = lease.deadline_unix_ms / 1000 - time.time()
        life = max(remaining + REPLY_GRACE_SECONDS, SHORTEST_TTL_SECONDS)
        content = RecordDict({LEASE_RECORD: ConfigRecord({**lease.to_record()})})
        message = Message(content, lease.node_id, MESSAGE_TYPE, ttl=life)
        pushed = [message_id for message_id in self._grid.push_messages([message]) if message_id]
        if not pushed:
            self._tell(lease.lease_id, 5, "Flower did not take the message")
            return
        self._sent[pushed[0]] = Sent(lease.lease_id, time.monotonic() + life)
        log.info("lease pushed", lease_id=lease.lease_id, node_id=str(lease.node_id), ttl_s=round(life))

    def _collect(self) -> None:
        """Pull the replies that are there, without waiting for the others."""
        for reply in self._replies():
            sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if sent is None:
                continue
            if reply.has_error():
                self._tell(sent.lease_id, reply.error.code or 5, reply.error.reason or "")
                continue
            try:
                report = report_from_record(dict(reply.content.config_records[REPORT_RECORD]))
            except (KeyError, RequestError) as error:
                self._tell(sent.lease_id, _UNREADABLE, f"unreadable reply: {error}")
                continue
            self._tell(sent.lease_id, 0, report.reason)
        now = time.monotonic()
        for message_id, sent in list(self._sent.items()):
            if now > sent.give_up_at:
                del self._sent[message_id]
                self._tell(sent.lease_id, 4, "no reply in time")

    def _replies(self) -> Iterable[Message]:
        return list(self._grid.pull_messages(list(self._sent))) if self._sent else []

    def _tell(self, lease_id: str, code: int, reason: str) -> None:
        log.info("lease replied", lease_id=lease_id, code=code, reason=reason[:200])
        self._outcomes.append(fleet_pb2.LeaseOutcome(lease_id=lease_id, error_code=code, reason=reason[:1000]))


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Dispatch leases until the run is stopped."""
    log.start_logging()
    directory = os.environ.get(SERVER_DIRECTORY)
    if not directory:
        raise ConfigError(f"{SERVER_DIRECTORY} is not set: this app is started by 'share-server run'")
    layout = Layout(Path(directory))
    announced = _announce(FleetFiles(layout.fleet), context.run_id)
    log.info("dispatching", run_id=str(context.run_id), pid=os.getpid(), lock=announced)
    dispatcher = Dispatcher(grid, HubLink(layout, read_config(layout.config)))
    down = False
    while True:
        try:
            dispatcher.round()
            down = False
        except UnavailableError as error:
            if not down:
                log.warning("hub does not answer, trying again", reason=str(error))
            down = True
            time.sleep(RETRY_SECONDS)
        time.sleep(POLL_SECONDS)


def _announce(files: FleetFiles, run_id: int) -> int:
    """Lock the file by which the supervisor sees us alive; return its descriptor, kept until we end.

    It also keeps a second ServerApp waiting while an older one still dispatches.
    """
    descriptor = os.open(files.server_app, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{run_id} {os.getpid()}\n".encode(), 0)
    return descriptor
