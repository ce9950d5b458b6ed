"""Several adapters in one version: what merging them one by one gives while there is room, tighter bounds beyond."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import share_core.merge as module
from share_core.errors import ConfigError, FedshareError
from share_core.linalg import difference_norm, product_norm
from share_core.merge import HubState, MergePolicy, empty_state, merge, merge_all
from share_core.space import task_adapter
from share_core.types import Adapter, Factors, SiteSpec, Space, SpaceSpec

SITES = {"one": SiteSpec("one", 24, 18, ""), "two": SiteSpec("two", 14, 30, "")}
SPEC = SpaceSpec("sha256:test", "test", SITES)


def draw(seed: int, count: int, rank: int) -> dict[str, Adapter]:
    """Return adapters of slightly different ranks; the second leaves a site out."""
    g = torch.Generator().manual_seed(seed)
    made: dict[str, Adapter] = {}
    for number in range(count):
        own = 1 + (rank + number) % max(rank, 1)
        made[f"org/t{number}"] = {
            name: Factors(torch.randn(site.d_out, own, generator=g), torch.randn(site.d_in, own, generator=g))
            for name, site in SITES.items()
            if not (number == 1 and name == "two")
        }
    return made


def one_by_one(state: HubState, adapters: Mapping[str, Adapter], policy: MergePolicy) -> HubState:
    for task, adapter in adapters.items():
        state = merge(state, task, adapter, policy).state
    return state


def same_bits(a: Space, b: Space) -> bool:
    """Whether two versions hold the same tasks with the same bits, whatever their numbers."""
    if a.cores.keys() != b.cores.keys():
        return False
    pairs = [(a.bases[site].left, b.bases[site].left) for site in SITES]
    pairs += [(a.bases[site].right, b.bases[site].right) for site in SITES]
    for task, own in a.cores.items():
        if own.keys() != b.cores[task].keys():
            return False
        for site, core in own.items():
            pairs += [(core.out, b.cores[task][site].out), (core.in_, b.cores[task][site].in_)]
    return all(torch.equal(x, y) for x, y in pairs)


def together_is_one_by_one(seed: int, count: int, rank: int, tau: float) -> None:
    policy = MergePolicy(k_max=256, tau=tau)
    before = one_by_one(empty_state(SPEC), draw(seed + 1, 3, 2), policy)
    adapters = draw(seed, count, rank)  # t0 to t2 are there already: their content is replaced
    merged = merge_all(before, adapters, policy)
    expected = one_by_one(before, adapters, policy)
    assert merged.state.space.version == before.space.version + 1
    assert same_bits(merged.state.space, expected.space)
    assert list(merged.relative_errors) == list(adapters)
    assert merged.state.ledger.keys() == expected.ledger.keys()
    for task, entry in merged.state.ledger.items():  # measured in more directions: the same up to rounding
        assert entry.measured == expected.ledger[task].measured
        assert entry.bound == pytest.approx(expected.ledger[task].bound, rel=1e-6, abs=1e-12)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 5),
    rank=st.integers(1, 4),
    tau=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_while_there_is_room_the_bits_are_those_of_one_by_one(seed: int, count: int, rank: int, tau: float) -> None:
    together_is_one_by_one(seed, count, rank, tau)


def test_planted_bug_earlier_ones_do_not_follow_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_grown_cores", lambda cores, appended: cores)
    with pytest.raises((AssertionError, FedshareError)):
        together_is_one_by_one(1, 4, 3, 0.05)


def errors(state: HubState, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    """Return the relative error of every task over all sites, from the factors themselves."""
    found = {}
    for task, adapter in adapters.items():
        stored = task_adapter(state.space, task, torch.float64)
        lost2 = norm2 = 0.0
        for site, factors in adapter.items():
            norm2 += float(product_norm(factors.out, factors.in_)) ** 2
            if site in stored:
                own = stored[site]
                lost2 += float(difference_norm(factors.out, factors.in_, own.out, own.in_)) ** 2
            else:
                lost2 += float(product_norm(factors.out, factors.in_)) ** 2
        found[task] = math.sqrt(lost2 / norm2)
    return found


def largest(state: HubState, adapters: Mapping[str, Adapter]) -> tuple[float, float]:
    """Return (largest error, largest bound of the ledger), after comparing the two for every task."""
    found = errors(state, adapters)
    for task, error in found.items():
        assert state.ledger[task].bound >= error * (1 - 1e-6), "the ledger never says less than was lost"
    return max(found.values()), max(state.ledger[task].bound for task in adapters)


def test_one_compaction_is_told_better_than_several() -> None:
    """Six adapters at a cap of 8: what is lost is about the same; what the ledger must assume adds up each time.

    These are the figures of docs/adr/0010.
    """
    policy, rows = MergePolicy(k_max=8, tau=0.0), []
    for seed in range(10):
        adapters = draw(seed, 6, 4)
        together = largest(merge_all(empty_state(SPEC), adapters, policy).state, adapters)
        single = largest(one_by_one(empty_state(SPEC), adapters, policy), adapters)
        assert together[1] < single[1], f"seed {seed}"
        rows.append((*together, *single))
    error, bound, single_error, single_bound = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    assert error < single_error
    assert (error, single_error) == pytest.approx((0.49, 0.50), abs=0.01)
    assert (bound, single_bound) == pytest.approx((0.49, 0.79), abs=0.01)


def test_nothing_is_no_version() -> None:
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_all(empty_state(SPEC), {}, MergePolicy())
