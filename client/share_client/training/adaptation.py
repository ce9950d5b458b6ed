"""How much of itself a task may add at each site: ``auto`` spends a budget of numbers where the gradient asks for it.

Coefficients of pseudo-rank p are trained at every site that has bases. Free directions cost ``d_out + d_in`` numbers
each. All together may send :data:`BUDGET` of what a LoRA of rank :data:`~.factors.REFERENCE_COLUMNS` sends; what the
coefficients leave of that is spent on directions, one after the other, on the strongest per number that is still
outside of the subspace: a step along it lowers the loss by the square of its singular value in the gradient, to first
order. So the first tasks, which find an empty subspace, bring directions, and later ones bring few (docs/adr/0020).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from share_client.training.factors import REFERENCE_COLUMNS
from share_client.training.gradients import SiteGradient
from share_client.training.plan import SitePlan
from share_core.types import SiteBasis

BUDGET = 0.2
"""Share of the numbers of a LoRA of rank 8 that one update sends, heads not counted."""

MOST_DIRECTIONS = 4
"""Largest number of free directions at one site."""


def fixed_plan(bases: Mapping[str, SiteBasis], rank: int, directions: int, why: str) -> dict[str, SitePlan]:
    """Return the same number of directions for every site, as far as it has room."""
    return {
        site: SitePlan(_rank(basis, rank), min(directions, _room(basis)), None, why) for site, basis in bases.items()
    }


def auto_plan(
    bases: Mapping[str, SiteBasis], gradients: Mapping[str, SiteGradient], rank: int, budget: float = BUDGET
) -> dict[str, SitePlan]:
    """Return for every site the directions that the budget buys, by the rule of the module's docstring.

    Args:
        bases: of the version that is trained in.
        gradients: of the task, with up to :data:`MOST_DIRECTIONS` directions outside.
        rank: pseudo-rank p.
        budget: see :data:`BUDGET`.
    """
    costs = {site: basis.left.shape[0] + basis.right.shape[0] for site, basis in bases.items()}
    left = budget * REFERENCE_COLUMNS * sum(costs.values())
    left -= sum(_rank(basis, rank) * (basis.k_out + basis.k_in) for basis in bases.values())
    counts = dict.fromkeys(bases, 0)
    for _, _, site in sorted(_candidates(bases, gradients, costs)):
        if costs[site] <= left:
            left -= costs[site]
            counts[site] += 1
    return {site: _planned(basis, gradients[site], rank, counts[site]) for site, basis in bases.items()}


def _planned(basis: SiteBasis, gradient: SiteGradient, rank: int, count: int) -> SitePlan:
    captured = gradient.captured
    inside = f"coefficients follow {captured:.0%} of the gradient" if _rank(basis, rank) else "no bases yet"
    if gradient.energy == 0:
        return SitePlan(_rank(basis, rank), 0, captured, "the loss does not depend on this site")
    won = float(gradient.strengths[:count].sum()) / gradient.energy
    more = f"{count} new direction{'s' * (count != 1)} {won:.0%}" if count else "others need the new directions more"
    return SitePlan(_rank(basis, rank), count, captured, f"{inside}, {more}")


def _candidates(
    bases: Mapping[str, SiteBasis], gradients: Mapping[str, SiteGradient], costs: Mapping[str, int]
) -> Iterator[tuple[bool, float, str]]:
    """Yield every direction that is worth something as a key, best first, and its site.

    The first one of a site without bases comes before all others: there nothing else can be trained, now or later.
    """
    for site, gradient in gradients.items():
        for number, strength in enumerate(gradient.strengths[:MOST_DIRECTIONS].tolist()):
            if strength > 0:
                yield number > 0 or _rank(bases[site], 1) > 0, -strength / costs[site], site


def _rank(basis: SiteBasis, rank: int) -> int:
    return min(rank, basis.k_out, basis.k_in)


def _room(basis: SiteBasis) -> int:
    return basis.right.shape[0] - basis.k_in
