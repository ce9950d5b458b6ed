"""What is trained at each site, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SitePlan:
    """What is trained at one site, and why."""

    pseudo_rank: int
    """Rank p of the coefficients."""
    directions: int
    """Free directions phi."""
    captured: float | None
    """Share of the energy of what was learned that lies in the subspace; None: it was not looked at."""
    why: str
    """In words, for the owner."""

    def __str__(self) -> str:
        """Return the plan in one line."""
        return f"rank {self.pseudo_rank}, {self.directions} new: {self.why}"
