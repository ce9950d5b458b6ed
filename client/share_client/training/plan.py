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
    """Share that lies in the subspace, of the first gradient's energy or, with a budget, of what was learned; None: not
    looked at."""
    why: str
    """In words, for the owner."""

    def __str__(self) -> str:
        """Return the plan in one line."""
        seen = "" if self.captured is None else f"; {self.captured:.0%} of what it needs lies in them"
        return f"rank {self.pseudo_rank}, {self.directions} new: {self.why}{seen}"
