"""Tables for people, made of the hub's answers."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from share_proto.v1 import hub_pb2


def show(table: Table) -> None:
    """Print a table on stdout."""
    Console().print(table)


def status_table(answer: hub_pb2.GetStatusResponse) -> Table:
    """Return the counters of the hub."""
    table = Table("hub", "", title=answer.space_id[:23], show_header=False)
    started = datetime.fromtimestamp(answer.started_unix_ms / 1000, tz=UTC)
    table.add_row("version", str(answer.version))
    table.add_row("tasks", str(answer.tasks))
    table.add_row("updates", f"{answer.merged} merged, {answer.accepted} waiting, {answer.refused} refused")
    table.add_row("subspace", f"k {answer.k_left_max} x {answer.k_right_max}, {decimal(answer.subspace_bytes)}")
    table.add_row("compactions", str(answer.compactions))
    table.add_row("subscribers", str(answer.subscribers))
    table.add_row("running since", f"{started:%Y-%m-%d %H:%M:%S} UTC")
    return table


def traffic_table(answer: hub_pb2.GetStatusResponse) -> Table:
    """Return the payload bytes exchanged with every member."""
    table = Table("member", title="payload bytes")
    for column in ("updates", "coefficients", "directions", "heads", "envelope", "deltas down", "snapshots down"):
        table.add_column(column, justify="right")
    for row in answer.traffic:
        up = row.up
        counts = (up.coefficients, up.directions, up.heads, up.envelope, row.down_deltas, row.down_snapshots)
        table.add_row(row.member, str(row.updates), *(decimal(count) for count in counts))
    return table


def task_table(answer: hub_pb2.ListTasksResponse) -> Table:
    """Return the tasks of one version."""
    table = Table("task", "owner", title=f"tasks of version {answer.version}")
    for column in ("created", "updated", "updates", "coefficients", "error bound"):
        table.add_column(column, justify="right")
    for task in answer.tasks:
        bound = f"{task.error_bound:.4f}" + (" over budget" if task.over_budget else "")
        table.add_row(
            task.task_id,
            task.owner,
            str(task.created_version),
            str(task.updated_version),
            str(task.updates),
            str(task.coefficients),
            bound,
        )
    return table
