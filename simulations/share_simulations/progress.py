"""Live progress of a federation on standard error: a table on a terminal, otherwise one line per change."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from share_client.session_log import sentence
from share_simulations.scenario import ClientPlan, Scenario
from share_simulations.watch import Observation

_TAIL_BYTES = 4096


@dataclass(frozen=True)
class ClientLine:
    """One client at one moment."""

    member: str
    state: str
    """not started, joining, training, submitted, evaluating or idle."""
    task: str
    """Task the state is about; empty where there is none."""
    version: int
    """Newest version at which the client reported an accuracy."""
    merged: int
    """Own tasks merged so far."""
    tasks: int
    """Own tasks in all."""
    detail: str = field(default="", compare=False)
    """What the client said last, for people."""


@dataclass(frozen=True)
class FederationView:
    """The whole federation at one moment."""

    version: int
    clients: tuple[ClientLine, ...]


def view_of(scenario: Scenario, arrived: Collection[str], seen: Observation, said: Mapping[str, str]) -> FederationView:
    """Derive what each client is doing from what has arrived there, what the hub has recorded and what it said last.

    ``said`` is by organisation; a client whose session has not begun is not in it.
    """
    lines = tuple(_client_line(c, arrived, seen, said.get(c.organisation, "")) for c in scenario.clients)
    return FederationView(seen.version, lines)


def last_said(session_log: Path) -> str:
    """Return the last event of a client's session log as a sentence; empty while there is none."""
    try:
        with session_log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError):  # the line that is being written
            return sentence(json.loads(line))
    return ""


def _client_line(client: ClientPlan, arrived: Collection[str], seen: Observation, said: str) -> ClientLine:
    names = {client.task_id(t): t.name for t in client.tasks}
    here = [t for t in names if t in arrived]
    merged = [t for t in here if t in seen.merged_tasks]
    submitted = {s.task for s in seen.submissions}
    version = max((seen.evaluated(t) for t in here), default=0)
    waiting = [t for t in here if t not in merged]
    behind = [t for t in merged if seen.evaluated(t) < seen.version]
    task = ""
    if not here:
        state = "not started"
    elif waiting:
        task = waiting[0]
        joined = bool(said) or version > 0
        state = "submitted" if task in submitted else "training" if joined else "joining"
    elif behind:
        state, task = "evaluating", behind[0]
    else:
        state = "idle"
    return ClientLine(client.member, state, names.get(task, ""), version, len(merged), len(names), said)


class Progress(Protocol):
    """Somewhere to show progress."""

    def note(self, text: str) -> None:
        """Say that a stage has begun."""

    def show(self, view: FederationView) -> None:
        """Show the newest view."""


class LineProgress:
    """One line per change, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, ClientLine] = {}

    def note(self, text: str) -> None:
        """Print the stage."""
        self._print(text)

    def show(self, view: FederationView) -> None:
        """Print the clients that changed since the last call."""
        for line in view.clients:
            if self._last.get(line.member) != line:
                self._last[line.member] = line
                what = f"{line.state} {line.task}".strip()
                count = f"{line.merged}/{line.tasks} merged"
                evaluated = f"evaluated at v{line.version}" if line.version else "nothing evaluated"
                self._print(f"v{view.version} {line.member}: {what}; {count}, {evaluated}")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class LiveProgress:
    """A table that is redrawn in place; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Print the stage above the table."""
        self._console.print(text, highlight=False, markup=False)

    def show(self, view: FederationView) -> None:
        """Redraw the table."""
        self._live.update(view_table(view))


def view_table(view: FederationView) -> Table:
    """Return the view as a table, one row per client."""
    table = Table(title=f"version {view.version}", title_justify="left", box=None, padding=(0, 2))
    for heading in ("client", "state", "task", "merged", "evaluated", "last said"):
        table.add_column(heading, justify="left", no_wrap=True)
    for line in view.clients:
        merged = f"{line.merged}/{line.tasks}"
        table.add_row(
            line.member, line.state, line.task, merged, f"v{line.version}" if line.version else "-", line.detail
        )
    return table


def progress_console() -> Console:
    """Return a console on standard error."""
    return Console(file=sys.stderr)
