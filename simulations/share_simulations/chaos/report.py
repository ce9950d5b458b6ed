"""What a campaign counts, and how it shows that it is alive."""

from __future__ import annotations

import platform
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from share_simulations.chaos.checks import KINDS, Finding

_LINE_EVERY_S = 15.0
_MOST_PROBLEMS = 20


@dataclass
class Tally:
    """Counts of one campaign."""

    counts: Counter[str] = field(default_factory=Counter)
    """Experiments by the kind of promise that was broken in them."""
    problems: list[str] = field(default_factory=list)
    """The first broken promises in words."""
    broken: int = 0
    """Experiments in which anything was broken."""

    def add(self, findings: Iterable[Finding], where: str) -> bool:
        """Count one experiment; return whether a promise was broken in it."""
        found = list(findings)
        for kind in {finding.kind for finding in found}:
            self.counts[kind] += 1
        self.broken += bool(found)
        if found and len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(f"{where}: {found[0].text}")
        return bool(found)

    def figures(self) -> dict[str, int]:
        """Return the count of every kind, zeros too."""
        return {kind: self.counts[kind] for kind in KINDS}


@dataclass(frozen=True)
class Caught:
    """How a campaign did against one planted bug."""

    name: str
    what: str
    after: int
    """Experiments until the first broken promise; 0: it survived."""
    sign: str
    """The first broken promise."""


class Meter:
    """Progress on standard error: a bar on a terminal, now and then a line elsewhere. No thread: experiments fork."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._began = self._said = time.monotonic()
        self._console = Console(file=sys.stderr)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Meter:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        self._console.print(
            f"{self._title}: {self._done} of {self._total} in {time.monotonic() - self._began:.0f} s",
            highlight=False,
            markup=False,
        )

    def step(self, text: str = "") -> None:
        """Say that one experiment is over."""
        self._done += 1
        now = time.monotonic()
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, description=f"{self._title} {text}", refresh=True)
        elif now - self._said > _LINE_EVERY_S:
            self._said = now
            self._console.print(f"{self._title}: {self._done} of {self._total} {text}", highlight=False, markup=False)


def assemble(
    campaign: str, seed: int, figures: dict[str, Any], tally: Tally, caught: list[Caught], began: float
) -> dict[str, Any]:
    """Return the report of one campaign; its key ``ok`` says whether every promise was kept and every bug caught."""
    surviving = [mutant.name for mutant in caught if not mutant.after]
    return {
        "campaign": campaign,
        "seed": seed,
        **figures,
        **tally.figures(),
        "mutants": len(caught),
        "mutants_caught": len(caught) - len(surviving),
        "mutants_by_name": {
            mutant.name: {"what": mutant.what, "caught_after": mutant.after, "sign": mutant.sign} for mutant in caught
        },
        "surviving": surviving,
        "problems": tally.problems,
        "seconds": round(time.monotonic() - began, 1),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, SQLite {sqlite3.sqlite_version}",
        "ok": tally.broken == 0 and not surviving,
    }
