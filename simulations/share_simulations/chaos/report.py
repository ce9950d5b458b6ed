"""What the campaigns of the crash lab count, and the report made of it."""

from __future__ import annotations

import platform
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from share_simulations.chaos.checks import KINDS, Finding

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
    """Short name of the bug."""
    what: str
    """What is wrong, in words."""
    after: int
    """Experiments until the first broken promise; 0: it survived."""
    sign: str
    """The first broken promise."""


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
        "complete": True,
        "ok": tally.broken == 0 and not surviving,
    }
