"""Progress of a campaign on standard error: one line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from share_simulations.progress import progress_console

_LINE_EVERY_S = 10.0
_REDRAW_EVERY_S = 0.1


class Meter:
    """Shows how far a campaign is. Use it as a context manager. It has no thread, because experiments fork."""

    def __init__(self, title: str, total: int | None = None) -> None:
        """``total`` is the number of experiments that :meth:`step` counts; None where nothing is counted."""
        self._title, self._total, self._done = title, total, 0
        self._began = self._said = time.monotonic()
        self._console = progress_console()
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
        if total is not None:
            columns[1:1] = [BarColumn(), MofNCompleteColumn()]
            columns.append(TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        if self._total is not None:
            self._print(f"{self._title}: {self._count()}in {time.monotonic() - self._began:.0f} s")

    def step(self, text: str = "") -> None:
        """Say that one experiment is over, and how the campaign stands."""
        self._done += 1
        self.show(text)

    def show(self, text: str) -> None:
        """Show the newest state; may be called as often as one likes."""
        now = time.monotonic()
        if now - self._said < (_REDRAW_EVERY_S if self._console.is_terminal else _LINE_EVERY_S):
            return
        self._said = now
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, description=f"{self._title}: {text}", refresh=True)
        else:
            self._print(f"{self._title}: {self._count()}{text}")

    def note(self, text: str) -> None:
        """Say something that stays."""
        self._print(f"{self._title}: {text}")

    def _count(self) -> str:
        return "" if self._total is None else f"{self._done} of {self._total} "

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
