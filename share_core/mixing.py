"""Many clients on one task: mixing in core coordinates.

In one version a core is linear in dW, so averaging cores is averaging dW, exactly, with ``k^2`` numbers in place of
``d^2`` (MATH section 2). Cores of an older version are lifted first (:func:`share_core.space.lift_cores` or through
ambient factors). The rules are those of the field:

* FedAsync (Xie, Koyejo, Gupta, 2019): ``C <- (1 - a_t) C + a_t C_new``, ``a_t = alpha s(t - tau)``;
* FedBuff (Nguyen et al., 2022): a buffer of K changes, each scaled by its staleness, is averaged and added at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from share_core.errors import ConfigError
from share_core.linalg import canonical, float64
from share_core.space import mean_cores
from share_core.types import Adapter, Cores, Factors


@dataclass(frozen=True)
class Staleness:
    """How much less an update counts that was trained ``n`` versions ago (FedAsync section 5.2)."""

    rule: Literal["constant", "polynomial", "hinge"] = "polynomial"
    """``constant``: 1. ``polynomial``: ``(1 + n)^-a``. ``hinge``: 1 up to ``b``, then ``1 / (1 + a (n - b))``."""
    a: float = 0.5
    b: float = 4.0

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.rule not in ("constant", "polynomial", "hinge"):
            raise ConfigError(f"staleness rule: expected constant, polynomial or hinge, got {self.rule!r}")
        if self.a < 0 or self.b < 0:
            raise ConfigError(f"staleness: expected a >= 0 and b >= 0, got {self.a} and {self.b}")

    def weight(self, versions: int) -> float:
        """Return the factor in (0, 1] for an update that is ``versions`` old.

        Raises:
            ConfigError: if it is negative: an update from the future.
        """
        if versions < 0:
            raise ConfigError(f"staleness of {versions} versions: an update cannot be newer than the hub")
        if self.rule == "polynomial":
            return float((1 + versions) ** -self.a)
        if self.rule == "hinge" and versions > self.b:
            return 1 / (1 + self.a * (versions - self.b))
        return 1.0


@dataclass(frozen=True)
class Contribution:
    """One client's cores for a shared task, in the coordinates of the version they are mixed in."""

    organisation: str
    cores: Cores
    staleness: int = 0
    rows: int = 0
    """Training rows the client declares; counted only up to the operator's cap, since nobody can check them."""


def contributor_weights(contributions: Sequence[Contribution], staleness: Staleness, rows_cap: int = 0) -> list[float]:
    """Return one weight per contribution, summing to 1: equal per organisation, times staleness.

    Several contributions of one organisation share its weight. With ``rows_cap`` above 0, declared rows up to that
    number weigh in addition.

    Raises:
        ConfigError: if there is nothing to weigh.
    """
    if not contributions:
        raise ConfigError("no contribution to weigh")
    own = [staleness.weight(c.staleness) * (max(1, min(c.rows, rows_cap)) if rows_cap else 1) for c in contributions]
    totals: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for contribution, weight in zip(contributions, own, strict=True):
        name = contribution.organisation
        totals[name] = totals.get(name, 0.0) + weight
        peaks[name] = max(peaks.get(name, 0.0), weight)
    shares = [
        peaks[c.organisation] * weight / totals[c.organisation] for c, weight in zip(contributions, own, strict=True)
    ]
    whole = sum(shares)
    return [share / whole for share in shares]


def average(contributions: Sequence[Contribution], staleness: Staleness, rank: int, rows_cap: int = 0) -> Cores:
    """Return the weighted average of all contributions, cut to ``rank``; see :func:`contributor_weights`."""
    weights = contributor_weights(contributions, staleness, rows_cap)
    return mean_cores([c.cores for c in contributions], rank, weights)


def mix_adapters(parts: Sequence[tuple[float, Adapter]], rank: int) -> Adapter:
    """Return ``sum_i w_i dW_i`` of ambient adapters, cut to ``rank`` per site: averaging dW itself.

    Args:
        parts: (weight, adapter); a site that one leaves out counts as zero there.
        rank: largest rank of the result; the cut is the best one and the only loss.
    """
    mixed: dict[str, Factors] = {}
    for site in sorted({site for _, adapter in parts for site in adapter}):
        own = [(weight, adapter[site]) for weight, adapter in parts if site in adapter]
        out = torch.cat([weight * float64(factors.out) for weight, factors in own], dim=1)
        in_ = torch.cat([float64(factors.in_) for _, factors in own], dim=1)
        u, s, v = canonical(out, in_)
        mixed[site] = Factors(u[:, :rank] * s[:rank], v[:, :rank])
    return mixed


def fedasync(current: Cores, update: Contribution, alpha: float, staleness: Staleness, rank: int) -> Cores:
    """Return ``(1 - a) C + a C_new`` with ``a = alpha s(staleness)``, cut to ``rank``.

    Raises:
        ConfigError: if alpha is not above 0 and at most 1.
    """
    if not 0 < alpha <= 1:
        raise ConfigError(f"mixing rate: expected more than 0 and at most 1, got {alpha}")
    a = alpha * staleness.weight(update.staleness)
    return mean_cores([current, update.cores], rank, [1 - a, a])


def fedbuff(current: Cores, changes: Sequence[Contribution], rate: float, staleness: Staleness, rank: int) -> Cores:
    """Return ``C + rate / K sum_i s(staleness_i) D_i`` for K buffered changes ``D_i = C_i - C_base``, cut to ``rank``.

    Args:
        current: the task now.
        changes: the buffer; ``cores`` of each are its change, in current coordinates.
        rate: server learning rate.
        staleness: how a change's age scales it.
        rank: largest rank of the result.
    """
    if not changes:
        return current
    scales = [rate * staleness.weight(change.staleness) / len(changes) for change in changes]
    return mean_cores([current, *(change.cores for change in changes)], rank, [1.0, *scales])


def change_of(trained: Cores, base: Cores, rank: int) -> Cores:
    """Return ``trained - base`` in one version's coordinates: what a client adds to a FedBuff buffer."""
    return mean_cores([trained, base], rank, [1.0, -1.0])
