"""How much of itself a task may add at each site: ``auto`` trains wide, then keeps what a budget of numbers buys.

For the first half of the steps every site has coefficients and :data:`~.factors.REFERENCE_COLUMNS` free directions, as
many as a LoRA. Then what was learned, ``dW = L E_o (R E_i).T + B A.T``, is sorted: as far as it lies in the subspace it
becomes coefficients of rank p, and of the rest, by singular values over all sites, the directions stay that hold most
energy per number that they cost to send, until all together send :data:`BUDGET` of what that LoRA would. The second
half of the steps trains what stayed. So tasks that find an empty subspace bring directions, and later ones bring few
(docs/adr/0021; pruning by what was learned is AdaLoRA's idea, arXiv 2303.10512).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from share_client.training.factors import IN_NORM, REFERENCE_COLUMNS, SpaceFactors
from share_client.training.plan import SitePlan
from share_core.linalg import canonical, float64, small_svd
from share_core.types import Core, SiteBasis

BUDGET = 0.2
"""Share of the numbers of a LoRA of rank 8 that one update sends, heads not counted."""

NARROW_AT = 0.5
"""Share of the steps after which only what is sent is trained."""


@dataclass(frozen=True)
class Learned:
    """What a wide training has learned at one site."""

    inside: Tensor
    """``L.T dW R`` (k_out, k_in), float64."""
    out: Tensor
    """Left singular vectors (d_out, n) of the rest, ``dW - L L.T dW R R.T``, float64."""
    in_: Tensor
    """Right ones (d_in, n)."""
    values: Tensor
    """Its singular values (n,), descending."""

    @property
    def energy(self) -> float:
        """``|dW|_F^2``: the two parts are orthogonal."""
        return float(self.inside.square().sum() + self.values.square().sum())


def learned_by(change: SpaceFactors) -> Learned:
    """Sort the change of one site into what lies in its bases and the rest."""
    left, right, out, in_ = (
        float64(part.detach().cpu()) for part in (change.left, change.right, change.free_out, change.free_in)
    )
    core_out, core_in = (float64(part.detach().cpu()) for part in (change.core_out, change.core_in))
    inside_out, inside_in = left.T @ out, right.T @ in_
    rest_out = torch.cat([out, -left @ inside_out], dim=1)
    rest_in = torch.cat([in_, right @ inside_in], dim=1)
    u, s, v = canonical(rest_out, rest_in)
    return Learned(core_out @ core_in.T + inside_out @ inside_in.T, u, v, s)


def narrowed(change: SpaceFactors, learned: Learned, plan: SitePlan) -> SpaceFactors:
    """Return the change that is trained on: coefficients of the plan's rank and its strongest directions."""
    u, s, v = small_svd(learned.inside)
    rank, count = plan.pseudo_rank, plan.directions
    core = Core((u[:, :rank] * s[:rank] / IN_NORM).float(), (v[:, :rank] * IN_NORM).float())
    kept = SpaceFactors(
        SiteBasis(change.left.cpu(), change.right.cpu()), core, (learned.in_[:, :count] * IN_NORM).float(), few=False
    )
    with torch.no_grad():
        kept.free_out.copy_(learned.out[:, :count] * learned.values[:count] / IN_NORM)
    return kept.to(change.left.device)


def fixed_plan(bases: Mapping[str, SiteBasis], rank: int, directions: int, why: str) -> dict[str, SitePlan]:
    """Return the same number of directions for every site, as far as it has room."""
    return {
        site: SitePlan(_rank(basis, rank), min(directions, _room(basis)), None, why) for site, basis in bases.items()
    }


def wide_plan(bases: Mapping[str, SiteBasis], rank: int) -> dict[str, SitePlan]:
    """Return what every site has in the first half of the steps."""
    return fixed_plan(bases, rank, REFERENCE_COLUMNS, "not narrowed yet")


def auto_plan(
    bases: Mapping[str, SiteBasis], learned: Mapping[str, Learned], rank: int, budget: float = BUDGET
) -> dict[str, SitePlan]:
    """Return for every site the directions that the budget buys, by the rule of the module's docstring.

    Args:
        bases: of the version that is trained in.
        learned: what the first half of the steps gave at every site.
        rank: pseudo-rank p.
        budget: see :data:`BUDGET`.
    """
    costs = {site: basis.left.shape[0] + basis.right.shape[0] for site, basis in bases.items()}
    left = budget * REFERENCE_COLUMNS * sum(costs.values())
    left -= sum(_rank(basis, rank) * (basis.k_out + basis.k_in) for basis in bases.values())
    counts = dict.fromkeys(bases, 0)
    for _, _, site in sorted(_candidates(bases, learned, costs)):
        if costs[site] <= left:
            left -= costs[site]
            counts[site] += 1
    return {site: _planned(basis, learned[site], rank, counts[site]) for site, basis in bases.items()}


def _candidates(
    bases: Mapping[str, SiteBasis], learned: Mapping[str, Learned], costs: Mapping[str, int]
) -> Iterator[tuple[bool, float, str]]:
    """Yield every direction that is worth something as a key, best first, and its site.

    The first one of a site without bases comes before all others: there nothing else can be trained, now or later.
    """
    for site, one in learned.items():
        for number, value in enumerate(one.values[:REFERENCE_COLUMNS].tolist()):
            if value > 0:
                yield number > 0 or _rank(bases[site], 1) > 0, -(value**2) / costs[site], site


def _planned(basis: SiteBasis, learned: Learned, rank: int, count: int) -> SitePlan:
    rank = _rank(basis, rank)
    energy = learned.energy
    if energy == 0:
        return SitePlan(rank, 0, 0.0, "nothing was learned at this site")
    held = float(small_svd(learned.inside)[1][:rank].square().sum()) / energy
    new = float(learned.values[:count].square().sum()) / energy
    inside = f"of what was learned the subspace holds {held:.0%}" if rank else "the subspace is empty here"
    more = f"{count} new direction{'s' * (count != 1)} {new:.0%}" if count else "other sites need new directions more"
    return SitePlan(rank, count, held, f"{inside}, {more}")


def _rank(basis: SiteBasis, rank: int) -> int:
    return min(rank, basis.k_out, basis.k_in)


def _room(basis: SiteBasis) -> int:
    return basis.right.shape[0] - basis.k_in
