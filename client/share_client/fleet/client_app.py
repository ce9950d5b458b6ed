"""The ClientApp: one Flower message is one lease, and one lease is one session.

The message carries no tensors and the reply a few counters. That the lease is over is told to the hub directly;
Flower's reply may be lost without harm. Of an error only its class leaves this machine: Flower would send its whole
text, which may name files or quote data. The text stands in the client's own logs.
"""

from __future__ import annotations

import os
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path

from share_core import lifeline

# Before anything heavy: from here on this process ends with the worker that started it.
lifeline.arm()

from flwr.app import ConfigRecord, Context, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

from share_client.fleet.environment import read_linger, read_paths  # noqa: E402
from share_client.link import HubLink, patiently  # noqa: E402
from share_client.member import ClientLayout, load_credentials, load_member  # noqa: E402
from share_client.session import SessionOptions, run_session  # noqa: E402
from share_core.errors import FedshareError  # noqa: E402
from share_core.lease import (  # noqa: E402
    LEASE_RECORD,
    MESSAGE_ACTION,
    REPORT_RECORD,
    Lease,
    LeaseReport,
    lease_from_record,
)

_CLOSE_S = 30.0
"""Seconds to try to tell the hub that a lease is over."""

app = ClientApp()


@app.train(MESSAGE_ACTION)
def work(message: Message, context: Context) -> Message:
    """Work one lease and reply with what was done."""
    record = message.content[LEASE_RECORD]
    report = _work(lease_from_record(dict(record)))
    content = RecordDict({REPORT_RECORD: ConfigRecord({**report.to_record()})})
    return Message(content=content, reply_to=message)


def _work(lease: Lease) -> LeaseReport:
    """Run the session and close the lease; return what may be told of it, whatever happens."""
    try:
        root, tasks_path = read_paths(os.environ)
        report = _session(root, tasks_path, lease)
        _close(root, lease, report)
        return report
    except Exception as error:  # Flower would send the text of anything that is raised here
        where = "".join(traceback.format_tb(error.__traceback__))
        print(f"the session failed with {type(error).__name__}:\n{where}", flush=True)
        return _failed(lease, error)


def _failed(lease: Lease, error: Exception) -> LeaseReport:
    reason = f"{type(error).__name__}: the client's own logs say why"
    return LeaseReport(lease.lease_id, submitted=0, idle=True, reason=reason)


def _session(root: Path, tasks_path: Path, lease: Lease) -> LeaseReport:
    """Run the session; a refusal becomes a report that says why, and the node is asked again later."""
    options = SessionOptions(linger_s=read_linger(os.environ, SessionOptions.linger_s))
    try:
        counters = run_session(root, tasks_path, lease, options=options)
    except FedshareError as error:
        print(f"the session failed: {error}", flush=True)
        return _failed(lease, error)
    return LeaseReport(lease.lease_id, submitted=counters.submitted, idle=counters.idle)


def _close(root: Path, lease: Lease, report: LeaseReport) -> None:
    """Tell the hub. If that fails the lease ends by itself at its deadline, so nobody waits for it here."""
    layout = ClientLayout(root)
    address = lease.hub_address or load_member(layout).hub_address
    give_up = threading.Event()
    timer = threading.Timer(_CLOSE_S, give_up.set)
    timer.daemon = True
    timer.start()
    try:
        with HubLink(address, load_credentials(layout, datetime.now(UTC))) as link:
            patiently(lambda: link.close_lease(lease.lease_id, report.idle, report.submitted), give_up)
    except FedshareError as error:
        print(f"lease {lease.lease_id} could not be closed: {error}", flush=True)
    finally:
        timer.cancel()
