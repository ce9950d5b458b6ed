"""Inner products from factors against those of the dense matrices. Planted bug: one factor that does not count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from share_core.robust import agreement
from share_core.robust.agreement import cosines, geometry, inner_products, norms_of
from share_core.types import Adapter, Factors

SITES = {"a": (7, 5), "b": (4, 9)}
EPS = torch.finfo(torch.float64).eps


def drawn(seed: int, ranks: dict[str, int]) -> dict[str, Factors]:
    draw = torch.Generator().manual_seed(seed)
    return {
        site: Factors(
            torch.randn(SITES[site][0], rank, generator=draw, dtype=torch.float64),
            torch.randn(SITES[site][1], rank, generator=draw, dtype=torch.float64),
        )
        for site, rank in ranks.items()
    }


def flat(adapter: Adapter) -> torch.Tensor:
    """Return dW of all sites as one vector, the obvious way."""
    parts = []
    for site, shape in SITES.items():
        own = adapter.get(site)
        parts.append(torch.zeros(shape, dtype=torch.float64) if own is None else own.out @ own.in_.T)
    return torch.cat([part.reshape(-1) for part in parts])


adapters = st.lists(
    st.dictionaries(st.sampled_from(sorted(SITES)), st.integers(0, 4), max_size=2), min_size=1, max_size=5
).flatmap(lambda ranks: st.integers(0, 2**30).map(lambda seed: [drawn(seed + i, r) for i, r in enumerate(ranks)]))


@settings(max_examples=60, deadline=None)
@given(adapters, st.integers(0, 2**30))
def test_products_equal_those_of_the_dense_matrices(said: list[dict[str, Factors]], seed: int) -> None:
    _compare(said, seed)


def _compare(said: list[dict[str, Factors]], seed: int) -> None:
    start = drawn(seed, {"a": 2, "b": 1})
    dense = torch.stack([flat(one) for one in said])
    moved = dense - flat(start)
    found = geometry(said, start)
    assert found.changes is not None
    bound = 100 * EPS * max(1.0, float(dense.square().sum()), float(flat(start).square().sum()))
    assert (found.whole - dense @ dense.T).abs().max() <= bound
    assert (found.changes - moved @ moved.T).abs().max() <= bound
    assert (norms_of(found.whole) - dense.norm(dim=1)).abs().max() <= math.sqrt(bound)
    assert cosines(found.whole).abs().max() <= 1 + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30), st.floats(1e-3, 1e3))
def test_the_gauge_does_not_count(seed: int, scale: float) -> None:
    one, other = drawn(seed, {"a": 3}), drawn(seed + 1, {"a": 3, "b": 2})
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    turned = {"a": Factors(scale * one["a"].out @ turn, one["a"].in_ @ turn / scale)}
    plain, gauged = inner_products([one, other]), inner_products([turned, other])
    assert (plain - gauged).abs().max() <= 1e3 * EPS * float(plain.abs().max())


def test_a_test_of_one_factor_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: comparing what one side says, which any client can turn as it likes."""
    monkeypatch.setattr(agreement, "float64", lambda x: torch.ones_like(x) if x.shape[0] == 5 else x.double())
    with pytest.raises(AssertionError):
        _compare([drawn(1, {"a": 2}), drawn(2, {"a": 2})], 3)
