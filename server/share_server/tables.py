"""Tables for people, made of the hub's answers; readable at 80 columns, and no name in them is ever cut."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from share_proto.v1 import hub_pb2

if TYPE_CHECKING:
    from share_server.operations.audit import Audit


def show(table: Table) -> None:
    """Print a table on stdout."""
    Console().print(table)


def status_table(answer: hub_pb2.GetStatusResponse) -> Table:
    """Return the counters of the hub."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    started = datetime.fromtimestamp(answer.started_unix_ms / 1000, tz=UTC)
    table.add_row("space", answer.space_id)
    table.add_row("version", str(answer.version))
    table.add_row("tasks", str(answer.tasks))
    table.add_row(
        "updates",
        f"{answer.merged} merged, {answer.accepted} waiting, {answer.refused} refused, "
        f"{answer.quarantined} in quarantine",
    )
    table.add_row("subspace", f"k {answer.k_left_max} x {answer.k_right_max}, {decimal(answer.subspace_bytes)}")
    table.add_row("compactions", str(answer.compactions))
    table.add_row("subscribers", str(answer.subscribers))
    table.add_row("running since", f"{started:%Y-%m-%d %H:%M:%S} UTC")
    return table


def traffic_table(answer: hub_pb2.GetStatusResponse) -> Table:
    """Return the payload bytes exchanged with every member.

    Up are coefficients and directions, down all versions; heads are what went both ways.
    """
    table = _names_and_numbers("member", numbers=("updates", "up", "heads", "envelope", "down", "total"))
    table.title = "payload bytes"
    for row in answer.traffic:
        up = row.up.coefficients + row.up.directions
        down = row.down_deltas + row.down_snapshots
        heads = row.up.heads + row.down_heads
        counts = (up, heads, row.up.envelope, down, up + heads + row.up.envelope + down)
        table.add_row(row.member, str(row.updates), *(decimal(count) for count in counts))
    return table


def task_table(answer: hub_pb2.ListTasksResponse) -> Table:
    """Return the tasks of one version."""
    spent = any(task.HasField("epsilon") for task in answer.tasks)
    numbers = ("first", "last", "updates", "coeff.", "error", *(("epsilon",) if spent else ()))
    table = _names_and_numbers("task", "owner", numbers=numbers)
    table.title = f"tasks of version {answer.version}"
    table.caption = "first, last: versions; coeff.: numbers stored; error: relative bound, ! over budget"
    if spent:
        table.caption += "; epsilon: spent by noise on coefficients"
    for task in answer.tasks:
        error = f"{task.error_bound:.4f}" + ("!" if task.over_budget else "")
        counts = (task.created_version, task.updated_version, task.updates, task.coefficients)
        epsilon = (f"{task.epsilon:.2f}" if task.HasField("epsilon") else "-",) if spent else ()
        table.add_row(task.task_id, task.owner, *(str(count) for count in counts), error, *epsilon)
    return table


def audit_table(audit: Audit) -> Table:
    """Return who contributed what."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("#", "member", "task", "payload", "state", "signature"):
        table.add_column(name, overflow="fold")
    table.title = "updates"
    table.caption = "payload: first digits of its SHA-256; signature: valid with the last digits of the certificate"
    for line in audit.updates:
        state = f"in version {line.version}" if line.version else line.state.lower()
        payload = f"{line.payload_sha256[:12]} {decimal(line.payload_bytes)}"
        signature = f"{line.signature} {line.certificate_serial[-8:]}".strip()
        table.add_row(str(line.ingest_seq), line.member, line.task_id, payload, state, signature)
    return table


def contributors_table(audit: Audit) -> Table:
    """Return whose updates every version took."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("version", justify="right", no_wrap=True)
    table.add_column("contributors", overflow="fold")
    for one in audit.versions:
        table.add_row(str(one.version), ", ".join(one.members))
    return table


def quarantine_table(updates: Sequence[hub_pb2.UpdateRecord]) -> Table:
    """Return the updates that wait for the operator, each with its reason."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("update", no_wrap=True)
    for name in ("member", "task", "reason"):
        table.add_column(name, overflow="fold")
    for one in updates:
        table.add_row(one.update_id, one.member, one.task_id, one.reason)
    return table


def _names_and_numbers(*names: str, numbers: tuple[str, ...]) -> Table:
    """Return an empty table; where it is too wide, names go on in the next line and numbers stay whole."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
