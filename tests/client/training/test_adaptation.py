"""How ``auto`` spends its budget, against the best of all ways to spend it."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from share_client.training import adaptation
from share_client.training.adaptation import MOST_DIRECTIONS, auto_plan, fixed_plan
from share_client.training.factors import REFERENCE_COLUMNS
from share_client.training.gradients import SiteGradient, seen_by
from share_client.training.plan import SitePlan
from share_core.types import SiteBasis

SITES = ("a", "b", "c")


def bases_of(width: int, k: int) -> dict[str, SiteBasis]:
    draw = torch.Generator().manual_seed(k)
    made = torch.linalg.qr(torch.randn(width, max(k, 1), generator=draw)).Q[:, :k]
    return {site: SiteBasis(made, made) for site in SITES}


def gradients_for(bases: dict[str, SiteBasis], seed: int) -> dict[str, SiteGradient]:
    draw = torch.Generator().manual_seed(seed)
    width = bases["a"].left.shape[0]
    return {
        site: seen_by(basis, torch.randn(width, width, generator=draw) * (number + 1), MOST_DIRECTIONS)
        for number, (site, basis) in enumerate(bases.items())
    }


def sent(plan: dict[str, SitePlan], bases: dict[str, SiteBasis]) -> int:
    return sum(
        one.directions * 2 * bases[site].left.shape[0] + one.pseudo_rank * (bases[site].k_out + bases[site].k_in)
        for site, one in plan.items()
    )


def check_it_is_the_best_that_the_budget_buys() -> None:
    for seed, k, budget in ((0, 3, 0.2), (1, 3, 0.4), (2, 5, 0.3), (3, 2, 0.6)):
        bases = bases_of(24, k)
        gradients = gradients_for(bases, seed)
        plan = auto_plan(bases, gradients, 8, budget)
        allowed = budget * REFERENCE_COLUMNS * 3 * 48
        assert sent(plan, bases) <= allowed
        won = {site: gradients[site].strengths.cumsum(0).tolist() for site in SITES}
        best = 0.0
        for counts in product(range(MOST_DIRECTIONS + 1), repeat=3):
            other = {site: SitePlan(k, count, None, "") for site, count in zip(SITES, counts, strict=True)}
            if sent(other, bases) <= allowed:
                best = max(best, sum(won[site][one.directions - 1] for site, one in other.items() if one.directions))
        chosen = sum(won[site][one.directions - 1] for site, one in plan.items() if one.directions)
        assert chosen == pytest.approx(best)


def test_it_is_the_best_that_the_budget_buys() -> None:
    check_it_is_the_best_that_the_budget_buys()


def check_sites_without_bases_come_first() -> None:
    bases = {**bases_of(24, 4), "b": SiteBasis(torch.zeros(24, 0), torch.zeros(24, 0))}
    weak = {**gradients_for(bases, 0), "b": seen_by(bases["b"], 1e-3 * torch.ones(24, 24), MOST_DIRECTIONS)}
    plan = auto_plan(bases, weak, 2, 0.12)
    assert {site: one.directions for site, one in plan.items()} == {"a": 0, "b": 1, "c": 1}
    assert plan["b"].why.startswith("no bases yet")


def test_sites_without_bases_come_first() -> None:
    check_sites_without_bases_come_first()


def test_a_site_that_the_loss_does_not_depend_on_gets_nothing() -> None:
    bases = bases_of(24, 0)
    gradients = {**gradients_for(bases, 0), "c": seen_by(bases["c"], torch.zeros(24, 24), MOST_DIRECTIONS)}
    plan = auto_plan(bases, gradients, 8, 10.0)
    assert plan["c"].directions == 0
    assert plan["a"].directions == MOST_DIRECTIONS
    assert "does not depend" in plan["c"].why


def test_what_it_says_is_what_the_gradient_is() -> None:
    bases = bases_of(24, 4)
    whole = bases["a"].left @ torch.randn(4, 4) @ bases["a"].right.T
    gradients = {site: seen_by(basis, whole, MOST_DIRECTIONS) for site, basis in bases.items()}
    for one in auto_plan(bases, gradients, 2, 1.0).values():
        assert one.captured == pytest.approx(1.0, abs=1e-5)
        assert "follow 100% of the gradient" in one.why


def test_a_fixed_number_is_kept_to_where_there_is_room() -> None:
    bases = {"a": bases_of(6, 4)["a"], "b": SiteBasis(torch.zeros(6, 0), torch.zeros(6, 0))}
    plan = fixed_plan(bases, 8, 3, "asked for")
    assert (plan["a"].directions, plan["b"].directions) == (2, 3)
    assert (plan["a"].pseudo_rank, plan["b"].pseudo_rank) == (4, 0)


real = adaptation._candidates


def _weakest_first(*given: Any) -> Any:
    return ((first, -worth, site) for first, worth, site in real(*given))


def _no_site_first(*given: Any) -> Any:
    return ((True, worth, site) for _, worth, site in real(*given))


@pytest.mark.parametrize(
    ("bug", "check"),
    [
        (_weakest_first, check_it_is_the_best_that_the_budget_buys),
        (_no_site_first, check_sites_without_bases_come_first),
    ],
)
def test_planted_bug_is_caught(bug: Any, check: Any) -> None:
    with mock.patch.object(adaptation, "_candidates", bug), pytest.raises(AssertionError):
        check()
