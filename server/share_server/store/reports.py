"""Reported scalars and byte counters."""

from __future__ import annotations

from collections.abc import Sequence

from share_core.errors import RequestError, UnknownTaskError
from share_server.store.journal import Journal
from share_server.store.records import EvaluationRow, TrafficRow

MOST_METRICS = 16
"""Metrics one task may have at one version: what a member reports must not fill everybody's list."""


def record_evaluations(journal: Journal, evaluations: Sequence[EvaluationRow]) -> None:
    """Write scalars, all or none; the same task, version and metric replaces its value.

    Raises:
        UnknownTaskError: a task does not exist.
        RequestError: a task would get more than :data:`MOST_METRICS` metrics at one version.
    """
    with journal.transaction():
        for one in evaluations:
            if journal.row("SELECT 1 FROM tasks WHERE task_id = ?", (one.task_id,)) is None:
                raise UnknownTaskError(f"there is no task {one.task_id!r} to report an evaluation for")
            journal.change(
                "INSERT INTO evaluations VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "value = excluded.value, rows = excluded.rows",
                (one.task_id, one.version, one.metric, one.value, one.rows),
            )
        for task_id, version in {(one.task_id, one.version) for one in evaluations}:
            found = journal.row(
                "SELECT count(*) FROM evaluations WHERE task_id = ? AND version = ?", (task_id, version)
            )
            if found is not None and found[0] > MOST_METRICS:
                raise RequestError(
                    f"task {task_id} would have {found[0]} metrics at version {version}, at most {MOST_METRICS} are "
                    "kept: nothing was recorded"
                )


def list_evaluations(journal: Journal) -> list[EvaluationRow]:
    """Return every scalar, sorted by task, version and metric."""
    rows = journal.rows("SELECT * FROM evaluations ORDER BY task_id, version, metric")
    return [EvaluationRow(r["task_id"], r["version"], r["metric"], r["value"], r["rows"]) for r in rows]


def list_traffic(journal: Journal) -> list[TrafficRow]:
    """Return the byte counters of every member that sent or received anything, sorted."""
    up = {
        row["member"]: row
        for row in journal.rows(
            "SELECT member, count(*) AS updates, sum(coefficients) AS coefficients, sum(directions) AS directions, "
            "sum(heads) AS heads, sum(envelope) AS envelope FROM updates GROUP BY member"
        )
    }
    down = {row["member"]: row for row in journal.rows("SELECT * FROM traffic")}
    names = ("coefficients", "directions", "heads", "envelope", "updates")
    return [
        TrafficRow(
            member=member,
            **({name: up[member][name] for name in names} if member in up else {}),
            **(
                {name: down[member][name] for name in ("down_deltas", "down_snapshots", "down_heads")}
                if member in down
                else {}
            ),
        )
        for member in sorted({*up, *down})
    ]
