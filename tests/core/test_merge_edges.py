"""Edges of a merge (MATH section 4, 9): what is refused by name, what changes nothing, and a known counter-example."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from share_core.errors import NonFiniteError, TensorShapeError
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import task_adapter
from share_core.types import Adapter, Factors, SiteSpec, SpaceSpec

SPEC = SpaceSpec(
    "sha256:test",
    "test",
    {"a.query": SiteSpec("a.query", 24, 18, "0" * 64), "a.value": SiteSpec("a.value", 14, 30, "0" * 64)},
)


def one_site(out: Tensor, in_: Tensor) -> Adapter:
    return {"a.query": Factors(out, in_)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite_is_refused_by_name(value: float, side: int) -> None:
    out, in_ = torch.ones(24, 2), torch.ones(18, 2)
    (out, in_)[side][3, 1] = value
    with pytest.raises(NonFiniteError, match=r"a\.query.*1 values"):
        merge(empty_state(SPEC), "org/t", one_site(out, in_), MergePolicy())


def test_planted_bug_without_the_finite_check_poisons_the_space() -> None:
    out = torch.ones(24, 2)
    out[0, 0] = float("nan")
    with mock.patch("share_core.merge.require_finite", lambda x, what: None), pytest.raises(Exception):  # noqa: B017
        state = merge(empty_state(SPEC), "org/t", one_site(out, torch.ones(18, 2)), MergePolicy()).state
        assert all(bool(torch.isfinite(b.left).all()) for b in state.space.bases.values())
        assert math.isfinite(state.ledger["org/t"].bound)


@pytest.mark.parametrize("rank", [0, 3])
def test_zero_and_rank_zero_adapters_change_nothing(rank: int) -> None:
    state = merge(
        empty_state(SPEC), "org/t", one_site(torch.zeros(24, rank), torch.zeros(18, rank)), MergePolicy()
    ).state
    assert state.space.version == 1
    assert state.space.cores["org/t"] == {}
    assert state.ledger["org/t"].bound == 0.0
    assert all(basis.k_out == 0 and basis.k_in == 0 for basis in state.space.bases.values())
    assert task_adapter(state.space, "org/t") == {}


def test_no_sites_at_all_is_a_task_that_changes_nothing() -> None:
    state = merge(empty_state(SPEC), "org/t", {}, MergePolicy()).state
    assert state.space.cores["org/t"] == {}


def test_unknown_site_and_wrong_shape_are_refused_by_name() -> None:
    with pytest.raises(TensorShapeError, match=r"nowhere"):
        merge(empty_state(SPEC), "org/t", {"nowhere": Factors(torch.ones(3, 1), torch.ones(3, 1))}, MergePolicy())
    with pytest.raises(TensorShapeError, match=r"expected factors 24 x r and 18 x r"):
        merge(empty_state(SPEC), "org/t", one_site(torch.ones(25, 1), torch.ones(18, 1)), MergePolicy())
    with pytest.raises(TensorShapeError, match=r"got \(24, 2\) and \(18, 1\)"):
        merge(empty_state(SPEC), "org/t", one_site(torch.ones(24, 2), torch.ones(18, 1)), MergePolicy())


def test_counter_example_errors_of_two_compactions_do_not_add_in_squares() -> None:
    """MATH section 2: a later append brings a dropped direction back, so squared losses do not sum to the error."""
    spec = SpaceSpec("sha256:test", "test", {"s": SiteSpec("s", 2, 2, "0" * 64)})
    policy = MergePolicy(k_max=1, tau=0.0)
    first = {"s": Factors(torch.tensor([[1.0, 0.0], [0.0, -0.9]]), torch.eye(2))}
    second = {"s": Factors(torch.ones(2, 1), torch.ones(2, 1))}
    one = merge(empty_state(spec), "org/a", first, policy).state
    two = merge(one, "org/b", second, policy).state
    bound = two.ledger["org/a"].bound * two.ledger["org/a"].norm
    stored = task_adapter(two.space, "org/a")["s"]
    truth = float((first["s"].out @ first["s"].in_.T - stored.out @ stored.in_.T).norm())
    assert bound >= truth
