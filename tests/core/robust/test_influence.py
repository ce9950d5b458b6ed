"""The cap on one organisation's weight, the harm to what is stored, and what scale cannot do.

Planted bugs: no cap, a cap that is not reached, a harm that looks at the wrong tasks.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from share_core import merge as merging
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.ledger import TaskLedger
from share_core.merge import HubState, MergePolicy, empty_state, merge_all
from share_core.robust.influence import influence_factors, owner_of
from share_core.robust.past import harm_of
from share_core.types import Adapter, Factors

SPEC = describe_space("toy", {"a": torch.zeros(32, 24), "b": torch.zeros(24, 24)}, k_max=8, rank_limit=8)

counts = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 40), min_size=1)


def tasks_of(owned: dict[str, int]) -> list[str]:
    return [f"{organisation}/t{i}" for organisation, count in owned.items() for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(counts, st.floats(0.01, 1.0))
def test_no_organisation_weighs_more_than_the_cap(owned: dict[str, int], most: float) -> None:
    factors = influence_factors(tasks_of(owned), most)
    cap = max(most, 2 / len(owned))
    weights = {organisation: factors[organisation] * count for organisation, count in owned.items()}
    whole = sum(weights.values())
    assert all(0 < factor <= 1 for factor in factors.values())
    if cap < 1:
        assert max(weights.values()) <= cap * whole * (1 + 1e-9)
    for organisation, factor in factors.items():  # nobody is made smaller than the cap asks for
        assert factor == 1 or weights[organisation] == pytest.approx(cap * whole, rel=1e-9)


def test_few_organisations_and_even_ones_keep_their_weights() -> None:
    assert set(influence_factors(tasks_of({"a": 30, "b": 1}), 0.25).values()) == {1.0}
    assert set(influence_factors(tasks_of(dict.fromkeys("abcdefgh", 5)), 0.25).values()) == {1.0}
    assert influence_factors([], 0.25) == {}
    with pytest.raises(ConfigError, match="influence"):
        MergePolicy(influence=0.0)


def drawn(seed: int, rank: int = 2, scale: float = 1.0) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return {
        site.name: Factors(
            scale * torch.randn(site.d_out, rank, generator=draw), torch.randn(site.d_in, rank, generator=draw)
        )
        for site in SPEC.sites.values()
    }


def after_a_crowd(influence: float, size: float = 1.0) -> HubState:
    """Return a space of four honest tasks, after one organisation has put 24 tasks of one subspace beside them."""
    policy = MergePolicy(k_max=8, refits=0, influence=influence)
    state = merge_all(empty_state(SPEC), {f"org{i}/t": drawn(i) for i in range(4)}, policy).state
    base = drawn(99, 8)
    for number in range(6):
        crowd = {}
        for part in range(4):
            draw = torch.Generator().manual_seed(100 * number + part)
            crowd[f"rival/t{number}-{part}"] = {
                site: Factors(size * f.out @ torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q, f.in_)
                for site, f in base.items()
            }
        state = merge_all(state, crowd, policy).state
    return state


def worst_honest(state: HubState) -> float:
    return max(state.ledger[f"org{i}/t"].bound for i in range(4))


def test_the_cap_keeps_the_others_in_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, lost = after_a_crowd(0.25), after_a_crowd(1.0)
    assert worst_honest(kept) < 0.8 < worst_honest(lost) - 0.4
    monkeypatch.setattr(merging, "influence_factors", lambda tasks, most: {owner_of(task): 1.0 for task in tasks})
    assert worst_honest(after_a_crowd(0.25)) == worst_honest(lost), "the planted bug: no cap"


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_a_private_task_changes_nothing_for_the_others(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a private task needs no cut: the weight in a compaction is that of the direction, not of the length."""

    def bounds(size: float) -> list[float]:
        policy = MergePolicy(k_max=8, refits=0, influence=0.25)
        state = merge_all(empty_state(SPEC), {f"org{i}/t": drawn(i) for i in range(4)}, policy).state
        state = merge_all(state, {"rival/t": drawn(50, 4, size)}, policy).state
        return [state.ledger[f"org{i}/t"].bound for i in range(4)]

    plain = bounds(1.0)
    assert bounds(scale) == pytest.approx(plain, abs=1e-4)
    monkeypatch.setattr(merging, "task_weight", lambda norm: 1.0)  # the planted bug: long tasks lead
    assert bounds(scale) != pytest.approx(bounds(1.0), abs=1e-2)


def ledger(**bounds: float) -> dict[str, TaskLedger]:
    return {name.replace("_", "/"): TaskLedger({"s": 2.0}, {"s": 2.0 * bound}, True) for name, bound in bounds.items()}


def test_harm_is_what_a_version_adds_to_tasks_of_others() -> None:
    before = ledger(a_t=0.1, b_t=0.2, c_t=0.0)
    after = ledger(a_t=0.9, b_t=0.55, c_t=0.3, d_t=0.9)
    worst = harm_of(before, after, {"d/t"}, {"d"}, 0.2)
    assert worst is not None and worst.task_id == "a/t" and worst.added == pytest.approx(0.8)
    assert "add 0.800" in str(worst) and "a/t" in str(worst) and "more than 0.2" in str(worst)
    own = harm_of(before, after, {"d/t"}, {"a"}, 0.2)
    assert own is not None and own.task_id == "b/t", "its own tasks are its own to harm"
    both = harm_of(before, after, {"d/t"}, {"a", "d"}, 0.2)
    assert both is not None and both.task_id == "a/t"
    assert harm_of(before, after, {"a/t", "b/t"}, {"d"}, 0.4) is None, "what is merged has new content"
    assert harm_of(before, after, {"d/t"}, {"d"}, 0.8 + 1e-9) is None
    assert harm_of(before, ledger(a_t=1.1, b_t=1.2, c_t=1.0), set(), {"d"}, 1.0) is None
