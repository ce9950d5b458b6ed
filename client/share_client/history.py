"""What ``share-client history`` shows: the private evaluation of each task after every version, and why it was trained.

Read from ``tasks/<task>/history.jsonl`` of the client directory; nothing of it is asked of, or told to, anybody.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from share_client.member import ClientLayout, load_member
from share_client.records import Records
from share_core.errors import ConfigError

PICTURES = (".png", ".svg")
"""Endings of the pictures that can be written."""

_UNKNOWN = "a release that did not write it down trained it"


def client_history(layout: ClientLayout, task: str | None = None) -> dict[str, Any]:
    """Return the history of every task of a client directory, or of one.

    ``tasks`` holds per task its ``rows``, oldest first: ``event`` (``evaluation`` or ``refit``), ``version``,
    ``metric``, ``value``, ``change`` since the evaluation before (None for the first), and ``why``: what trained the
    coefficients that were merged in this version, or why a refit was not sent; empty where others were merged.

    Raises:
        ConfigError: the directory is not enrolled, or has no such task.
    """
    member = load_member(layout)
    records = Records(layout.tasks)
    names = [record.task for record in records.all()]
    if task is not None and task not in names:
        near = difflib.get_close_matches(task, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{layout.root}: no task {task!r} was ever merged here, only {', '.join(names) or '-'}{hint}")
    chosen = names if task is None else [task]
    return {
        "member": member.member,
        "tasks": [{"task": name, "rows": history_rows(records.history(name))} for name in chosen],
    }


def history_rows(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one task from the lines of its history, by version."""
    merged = {line["version"]: line.get("why") or _UNKNOWN for line in lines if line["event"] == "merged"}
    rows: list[dict[str, Any]] = []
    last: dict[str, float] = {}
    for line in sorted(lines, key=lambda line: int(line.get("version", 0))):
        if line["event"] == "evaluation":
            metric, value = line["metric"], line["value"]
            change = value - last[metric] if metric in last else None
            last[metric] = value
            why = merged.get(line["version"], "")
        elif line["event"] == "refit" and not line["sent"]:
            metric, value, change, why = "", None, None, f"not trained anew: {line['reason']}"
        else:
            continue
        row = {"event": line["event"], "version": line["version"], "metric": metric, "value": value}
        rows.append({**row, "change": change, "why": why})
    return rows


def print_history(found: Mapping[str, Any]) -> None:
    """Print what :func:`client_history` returned as one table."""
    table = Table(
        box=box.SIMPLE_HEAD, caption="private evaluations after every version; they stay here unless reported"
    )
    table.add_column("task", overflow="fold")
    for heading in ("version", "metric", "value", "change"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for task in found["tasks"]:
        for number, row in enumerate(task["rows"]):
            value = "-" if row["value"] is None else f"{row['value']:.4f}"
            change = "-" if row["change"] is None else f"{row['change']:+.4f}"
            name = task["task"] if number == 0 else ""
            table.add_row(name, str(row["version"]), row["metric"] or "-", value, change, row["why"])
        table.add_section()
    Console().print(table)


def check_picture(path: Path) -> None:
    """Refuse an ending that is no picture's, before any work is done.

    Raises:
        ConfigError: naming the endings that are known.
    """
    if path.suffix not in PICTURES:
        raise ConfigError(f"--plot: expected a file that ends in {' or '.join(PICTURES)}, got {path.name!r}")


def plot_history(found: Mapping[str, Any], path: Path) -> None:
    """Draw the evaluations of every task over versions into ``path``; a dot marks what was merged. Needs no display.

    Raises:
        ConfigError: the ending is no picture's, matplotlib is missing, or there is no evaluation to draw.
    """
    check_picture(path)
    if not any(row["event"] == "evaluation" for task in found["tasks"] for row in task["rows"]):
        raise ConfigError(f"{path}: there is nothing to draw: no version was evaluated yet")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'fedshare[plots]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for task in found["tasks"]:
        for metric in sorted({row["metric"] for row in task["rows"] if row["event"] == "evaluation"}):
            rows = [row for row in task["rows"] if row["metric"] == metric]
            label = f"{task['task']}: {metric}"
            (line,) = axes.plot([r["version"] for r in rows], [r["value"] for r in rows], label=label, linewidth=1.5)
            own = [row for row in rows if row["why"]]
            axes.plot([r["version"] for r in own], [r["value"] for r in own], "o", color=line.get_color(), markersize=5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="version", ylabel="private evaluation", title=f"{found['member']}: dots mark own merges")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
