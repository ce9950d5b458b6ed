"""How ``auto`` spends its budget, against the best of all ways to spend it."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from share_client.training import adaptation
from share_client.training.adaptation import (
    Learned,
    budget_of,
    budget_plan,
    fixed_plan,
    learned_by,
    narrow_at,
    narrowed,
    small_plan,
)
from share_client.training.factors import IN_NORM, REFERENCE_COLUMNS, SpaceFactors
from share_client.training.options import TrainingOptions
from share_client.training.plan import SitePlan
from share_core.linalg import small_svd
from share_core.privacy import SampleNoise
from share_core.types import Core, SiteBasis

SITES = ("a", "b", "c")
MOST = REFERENCE_COLUMNS


def bases_of(width: int, k: int) -> dict[str, SiteBasis]:
    draw = torch.Generator().manual_seed(k)
    made = torch.linalg.qr(torch.randn(width, max(k, 1), generator=draw)).Q[:, :k]
    return {site: SiteBasis(made, made) for site in SITES}


def change_of(basis: SiteBasis, seed: int, size: float = 1.0, directions: int = MOST) -> SpaceFactors:
    """Return a change whose numbers are random, as a training might have left them."""
    draw = torch.Generator().manual_seed(seed)
    rank, width = min(8, basis.k_in), basis.right.shape[0]
    core = Core(size * torch.randn(basis.k_out, rank, generator=draw), torch.randn(basis.k_in, rank, generator=draw))
    change = SpaceFactors(basis, core, torch.randn(width, directions, generator=draw))
    with torch.no_grad():
        change.free_out.copy_(size * torch.randn(change.free_out.shape, generator=draw))
    return change


def learned_for(bases: dict[str, SiteBasis], seed: int) -> dict[str, Learned]:
    return {
        site: learned_by(change_of(basis, 10 * seed + number, number + 1.0))
        for number, (site, basis) in enumerate(bases.items())
    }


def dense(change: SpaceFactors) -> Tensor:
    out, in_ = change.factors()
    return (out.detach() @ in_.detach().T).double()


def test_what_was_learned_is_sorted_into_the_subspace_and_the_rest() -> None:
    basis = bases_of(24, 5)["a"]
    change = change_of(basis, 3)
    learned = learned_by(change)
    whole, left, right = dense(change), basis.left.double(), basis.right.double()
    torch.testing.assert_close(learned.inside, left.T @ whole @ right, atol=1e-4, rtol=1e-4)
    rest = whole - left @ learned.inside @ right.T
    torch.testing.assert_close((learned.out * learned.values) @ learned.in_.T, rest, atol=1e-4, rtol=1e-4)
    assert learned.energy == pytest.approx(float(whole.square().sum()), rel=1e-5)


def check_what_stays_is_the_best_of_its_size() -> None:
    basis = bases_of(24, 5)["a"]
    change = change_of(basis, 4)
    learned = learned_by(change)
    kept = narrowed(change, learned, SitePlan(3, 2, None, ""))
    u, s, vh = torch.linalg.svd(learned.inside)
    x, t, yh = torch.linalg.svd(dense(change) - basis.left.double() @ learned.inside @ basis.right.double().T)
    best = basis.left.double() @ (u[:, :3] * s[:3]) @ vh[:3] @ basis.right.double().T + (x[:, :2] * t[:2]) @ yh[:2]
    torch.testing.assert_close(dense(kept), best, atol=1e-4, rtol=1e-4)
    for columns in (kept.core_in, kept.free_in):
        torch.testing.assert_close(columns.norm(dim=0), torch.full((columns.shape[1],), IN_NORM), atol=1e-5, rtol=1e-5)
    wide = SpaceFactors(basis, Core(torch.zeros(5, 1), torch.zeros(5, 1)), torch.zeros(24, 8), wide=True)
    assert kept.rated()[2].multiple == 4 * wide.rated()[2].multiple, "two directions take larger steps than eight"


def test_what_stays_is_the_best_of_its_size() -> None:
    check_what_stays_is_the_best_of_its_size()


def test_all_of_it_stays_where_there_is_room_for_all() -> None:
    basis = bases_of(24, 4)["a"]
    change = change_of(basis, 5, directions=1)
    torch.testing.assert_close(
        dense(narrowed(change, learned_by(change), SitePlan(4, 3, None, ""))), dense(change), atol=1e-4, rtol=1e-4
    )


def sent(plan: dict[str, SitePlan], bases: dict[str, SiteBasis]) -> int:
    return sum(
        one.directions * 2 * bases[site].left.shape[0] + one.pseudo_rank * (bases[site].k_out + bases[site].k_in)
        for site, one in plan.items()
    )


def check_it_is_the_best_that_the_budget_buys() -> None:
    for seed, k, budget in ((0, 3, 0.2), (1, 3, 0.4), (2, 5, 0.3), (3, 2, 0.6)):
        bases = {site: basis for site, basis in bases_of(24, k).items() if site != "c"}
        learned = learned_for(bases, seed)
        plan = budget_plan(bases, learned, 8, budget)
        allowed = budget * REFERENCE_COLUMNS * 2 * 48
        assert sent(plan, bases) <= allowed
        inside = {site: torch.linalg.svdvals(learned[site].inside).square().tolist() for site in bases}
        new = {site: learned[site].values.square().tolist() for site in bases}

        def won(plan: dict[str, SitePlan], inside: Any = inside, new: Any = new) -> float:
            pairs = [(inside[s][: one.pseudo_rank], new[s][: one.directions]) for s, one in plan.items()]
            return float(sum(sum(held) + sum(added) for held, added in pairs))

        least = min(value / 48 for site, one in plan.items() for value in new[site][: one.directions] or [1e9])
        best = 0.0
        for r_a, n_a, r_b, n_b in product(range(k + 1), range(MOST + 1), range(k + 1), range(MOST + 1)):
            other = {"a": SitePlan(r_a, n_a, None, ""), "b": SitePlan(r_b, n_b, None, "")}
            if sent(other, bases) <= allowed:
                best = max(best, won(other))
        # The greedy choice may leave room that is too small for one more direction: by no more than that one.
        assert won(plan) >= best - 48 * least
        assert won(plan) >= 0.9 * best


def test_it_is_the_best_that_the_budget_buys() -> None:
    check_it_is_the_best_that_the_budget_buys()


def test_a_site_where_nothing_was_learned_gets_nothing() -> None:
    bases = bases_of(24, 0)
    plan = budget_plan(bases, {**learned_for(bases, 0), "c": learned_by(change_of(bases["c"], 0, 0.0))}, 8, 10.0)
    assert plan["c"].directions == 0
    assert plan["a"].directions == MOST
    assert "nothing was learned" in plan["c"].why


def test_what_it_says_is_what_was_learned() -> None:
    bases = bases_of(24, 4)
    inside = {site: learned_by(change_of(basis, 2, directions=0)) for site, basis in bases.items()}
    for one in budget_plan(bases, inside, 8, 1.0).values():
        assert one.captured == pytest.approx(1.0, abs=1e-5)
        assert one.why == "100% of what was learned is kept"
        assert str(one).endswith("; 100% of what it needs lies in them")
    for site, one in budget_plan(bases, learned_for(bases, 1), 2, 0.3).items():
        learned = learned_for(bases, 1)[site]
        inside = torch.linalg.svdvals(learned.inside).square()
        assert one.captured == pytest.approx(float(inside.sum()) / learned.energy)
        sent = float(inside[: one.pseudo_rank].sum() + learned.values[: one.directions].square().sum())
        assert f"{sent / learned.energy:.0%} of what was learned is kept" in one.why


def test_empty_bases_get_more_directions() -> None:
    bases = {**bases_of(24, 16), "b": bases_of(24, 23)["a"], "c": bases_of(24, 0)["a"]}
    plan = small_plan(bases, 8)
    assert [plan[site].directions for site in SITES] == [2, 1, 4], "as far as there is room"
    assert [plan[site].pseudo_rank for site in SITES] == [8, 8, 0]
    assert "16 vectors" in plan["a"].why
    assert plan["c"].why == "the bases are empty"


def test_a_budget_is_the_default_where_it_is_worth_it() -> None:
    small, large = bases_of(64, 4), bases_of(384, 4)
    noise = SampleNoise(1.0, 1e-5, 1.0, 1.0, 3, 0.2)
    assert budget_of(large, TrainingOptions(), None) == 0.2
    assert budget_of(small, TrainingOptions(), None) is None
    assert budget_of(small, TrainingOptions(budget=0.5), None) == 0.5
    assert budget_of(large, TrainingOptions(directions=2), None) is None
    assert budget_of(large, TrainingOptions(), noise) is None


@pytest.mark.parametrize(("steps", "wide"), [(1, 1), (12, 10), (40, 33), (60, 40), (120, 40), (141, 47), (3000, 1000)])
def test_few_steps_are_cut_late(steps: int, wide: int) -> None:
    assert round(narrow_at(steps) * steps) == wide


def test_a_fixed_number_is_kept_to_where_there_is_room() -> None:
    bases = {"a": bases_of(6, 4)["a"], "b": SiteBasis(torch.zeros(6, 0), torch.zeros(6, 0))}
    plan = fixed_plan(bases, 8, 3, "asked for")
    assert (plan["a"].directions, plan["b"].directions) == (2, 3)
    assert (plan["a"].pseudo_rank, plan["b"].pseudo_rank) == (4, 0)


real = adaptation._candidates


def _weakest_first(*given: Any) -> Any:
    return ((-worth, *rest) for worth, *rest in real(*given))


def _weakest_kept(x: Tensor) -> Any:
    u, s, v = small_svd(x)
    return u.flip(1), s.flip(0), v.flip(1)


@pytest.mark.parametrize(
    ("where", "bug", "check"),
    [
        ("small_svd", _weakest_kept, check_what_stays_is_the_best_of_its_size),
        ("_candidates", _weakest_first, check_it_is_the_best_that_the_budget_buys),
    ],
)
def test_planted_bug_is_caught(where: str, bug: Any, check: Any) -> None:
    with mock.patch.object(adaptation, where, bug), pytest.raises(AssertionError):
        check()
