"""How much of itself a task may add at each site, and why.

With a budget (:func:`budget_plan`), the default, every site is trained wide, with :data:`~.factors.REFERENCE_COLUMNS`
free directions, as many as a LoRA has. After some of the steps (:func:`narrow_at`) what was learned, ``dW = L E_o
(R E_i).T + B A.T``, is sorted. What lies in the subspace costs ``k_out + k_in`` numbers for each rank to send; of the
rest a direction costs ``d_out + d_in``. Over all sites the singular values with most energy per number are kept, until
all together send the budget's share of what that LoRA would; the other steps train those. (Pruning by what was learned
is AdaLoRA's idea, arXiv 2303.10512.)

On small backbones, where the budget would buy less than :data:`LEAST_NUMBERS` at a site, the default
(:func:`small_plan`) is coefficients in the bases that are there, and :data:`DIRECTIONS` free directions beside them,
more where the bases are empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from share_client.training.factors import IN_NORM, REFERENCE_COLUMNS, SpaceFactors
from share_client.training.options import TrainingOptions
from share_client.training.plan import SitePlan
from share_core.linalg import canonical, float64, small_svd
from share_core.privacy import Declaration
from share_core.types import Core, SiteBasis

WIDE_STEPS = 40
"""Steps that it takes to find out what a task needs most."""

LEAST_WIDE, MOST_WIDE = 1 / 3, 5 / 6
"""Least and largest share of the steps that is trained wide."""

BUDGET = 0.2
"""Share of the numbers of a LoRA of rank 8 that is sent by default."""

LEAST_NUMBERS = 1024
"""Numbers at a site, on average, below which the default is no budget: 4 KiB are not worth saving at."""

DIRECTIONS = 2
"""Free directions of small backbones where the bases hold something."""

FIRST_DIRECTIONS = 4
"""The same where the bases are empty: there is nothing yet to combine."""


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
    """Return the part of a change that is kept: coefficients of the plan's rank and its strongest directions."""
    u, s, v = small_svd(learned.inside)
    rank, count = plan.pseudo_rank, plan.directions
    core = Core((u[:, :rank] * s[:rank] / IN_NORM).float(), (v[:, :rank] * IN_NORM).float())
    free_in = (learned.in_[:, :count] * IN_NORM).float()
    kept = SpaceFactors(SiteBasis(change.left.cpu(), change.right.cpu()), core, free_in)
    with torch.no_grad():
        kept.free_out.copy_(learned.out[:, :count] * learned.values[:count] / IN_NORM)
    return kept.to(change.left.device)


def narrow_at(steps: int) -> float:
    """Return the share of ``steps`` that is trained wide where there is a budget (docs/adr/0021)."""
    return min(MOST_WIDE, max(LEAST_WIDE, WIDE_STEPS / max(1, steps)))


def fixed_plan(bases: Mapping[str, SiteBasis], rank: int, directions: int, why: str) -> dict[str, SitePlan]:
    """Return the same number of directions for every site, as far as it has room."""
    return {
        site: SitePlan(_rank(basis, rank), min(directions, _room(basis)), None, why) for site, basis in bases.items()
    }


def budget_of(bases: Mapping[str, SiteBasis], options: TrainingOptions, declared: Declaration | None) -> float | None:
    """Return the budget of a training, asked for or by default; None where something else says what is sent.

    Args:
        bases: of the version that is trained in.
        options: what was asked for.
        declared: noise; it goes with fixed numbers only.
    """
    if declared is not None:
        return None
    if options.budget is not None or options.directions is not None:
        return options.budget
    return BUDGET if budgeted(bases, BUDGET) >= LEAST_NUMBERS * len(bases) else None


def small_plan(bases: Mapping[str, SiteBasis], rank: int) -> dict[str, SitePlan]:
    """Return the default of small backbones, by the rule of the module's docstring."""
    return {site: _small(basis, rank) for site, basis in bases.items()}


def _small(basis: SiteBasis, rank: int) -> SitePlan:
    k = min(basis.k_out, basis.k_in)
    if k == 0:
        return SitePlan(0, min(FIRST_DIRECTIONS, _room(basis)), None, "the bases are empty")
    return SitePlan(_rank(basis, rank), min(DIRECTIONS, _room(basis)), None, f"the bases hold {k} vectors")


def budget_plan(
    bases: Mapping[str, SiteBasis], learned: Mapping[str, Learned], rank: int, budget: float
) -> dict[str, SitePlan]:
    """Return for every site the rank and the directions that the budget buys, by the rule of the module's docstring.

    Args:
        bases: of the version that is trained in.
        learned: what was learned at every site.
        rank: largest rank of the coefficients.
        budget: share of the numbers of a LoRA of rank 8 that one update sends, heads not counted.
    """
    left = budgeted(bases, budget)
    ranks, counts = dict.fromkeys(bases, 0), dict.fromkeys(bases, 0)
    for _, cost, site, inside in sorted(_candidates(bases, learned, rank)):
        if cost <= left:
            left -= cost
            (ranks if inside else counts)[site] += 1
    return {site: _planned(learned[site], ranks[site], counts[site]) for site in bases}


def budgeted(bases: Mapping[str, SiteBasis], budget: float) -> int:
    """Return how many numbers an update may have, its head not counted."""
    lora = REFERENCE_COLUMNS * sum(basis.left.shape[0] + basis.right.shape[0] for basis in bases.values())
    return int(budget * lora)


def _candidates(
    bases: Mapping[str, SiteBasis], learned: Mapping[str, Learned], rank: int
) -> Iterator[tuple[float, int, str, bool]]:
    """Yield minus the energy per number of all that could be sent, its numbers, its site, and whether it is inside."""
    for site, one in learned.items():
        basis = bases[site]
        inside = small_svd(one.inside)[1][:rank].tolist()
        for values, cost, held in (
            (inside, basis.k_out + basis.k_in, True),
            (one.values[:REFERENCE_COLUMNS].tolist(), basis.left.shape[0] + basis.right.shape[0], False),
        ):
            yield from ((-(value**2) / cost, cost, site, held) for value in values if value > 0)


def _planned(learned: Learned, rank: int, count: int) -> SitePlan:
    energy = learned.energy
    if energy == 0:
        return SitePlan(0, 0, 0.0, "nothing was learned at this site")
    inside = small_svd(learned.inside)[1].square()
    share = float(inside.sum()) / energy
    sent = float(inside[:rank].sum() + learned.values[:count].square().sum()) / energy
    return SitePlan(rank, count, share, f"{sent:.0%} of what was learned is kept")


def _rank(basis: SiteBasis, rank: int) -> int:
    return min(rank, basis.k_out, basis.k_in)


def _room(basis: SiteBasis) -> int:
    return basis.right.shape[0] - basis.k_in
