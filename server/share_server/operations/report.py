"""What a verification has found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from share_core.errors import FedshareError


@dataclass
class Report:
    """Counted and found; :attr:`problems` empty means that everything holds."""

    format: int = 0
    """Format of the store as it lies there."""
    versions: int = 0
    """Committed versions, collected ones included."""
    updates: int = 0
    """Accepted updates, refused ones included."""
    payloads: int = 0
    """Payload files whose bytes were read."""
    bytes: int = 0
    """Their size together."""
    entries: int = 0
    """Entries of the hash chain."""
    signatures: int = 0
    """Updates whose signature was checked; the others are of format 2 or before."""
    orphans: list[str] = field(default_factory=list)
    """Payload files that no row needs: left behind by a crash, removed by the next collection."""
    replayed: int = 0
    """Versions made anew."""
    bit_equal: int = 0
    """Those of them whose bytes were equal."""
    largest_distance: float = 0.0
    """Largest distance between a stored and a replayed version whose bytes differ."""
    ledger_violations: int = 0
    """Tasks whose stored form is further from what was submitted than their ledger says."""
    notes: list[str] = field(default_factory=list)
    """What to know that is no problem."""
    problems: list[str] = field(default_factory=list)
    """One sentence each."""

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Make whatever the block raises a problem, so that the next check runs."""
        try:
            yield
        except (FedshareError, OSError) as error:
            self.problems.append(f"{what}: {error}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # rows that say nonsense
            self.problems.append(f"{what}: what is stored makes no sense ({type(error).__name__}: {error})")
