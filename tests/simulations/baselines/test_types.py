"""The error measure, and what methods say that cannot take a pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from share_core.errors import ConfigError
from share_core.types import Adapter, Factors
from share_simulations.baselines.types import (
    Compressed,
    InapplicableError,
    by_site,
    by_task,
    equal_rank,
    errors,
    one_for_all,
    optional_package,
)

Pool = Callable[..., dict[str, Adapter]]
Dense = Callable[[Factors], Tensor]


def test_errors_are_those_of_the_dense_matrices(pool: Pool, dense: Dense) -> None:
    adapters, stored = pool(0, (2, 3, 1)), pool(1, (3, 1, 2))
    found = errors(adapters, Compressed("other", stored, 0, 0.0))
    for task, adapter in adapters.items():
        gone = sum(float((dense(f) - dense(stored[task][s])).square().sum()) for s, f in adapter.items())
        whole = sum(float(dense(f).square().sum()) for f in adapter.values())
        assert found[task] == pytest.approx((gone / whole) ** 0.5, rel=1e-12)


def test_missing_sites_are_zero_on_either_side(pool: Pool, dense: Dense) -> None:
    full = pool(0, (2,))["task0"]
    half = {"block.0.query": full["block.0.query"]}
    lost, kept = (float(dense(full[s]).norm()) for s in ("block.1.value", "block.0.query"))
    assert errors({"t": full}, Compressed("x", {"t": half}, 0, 0.0))["t"] == pytest.approx(
        lost / (lost**2 + kept**2) ** 0.5
    )
    assert errors({"t": half}, Compressed("x", {"t": full}, 0, 0.0))["t"] == pytest.approx(lost / kept)


def test_a_task_that_changes_nothing_has_lost_nothing(pool: Pool) -> None:
    adapters = pool(0, (2,))
    zero: dict[str, Adapter] = {
        "task0": {s: Factors(torch.zeros_like(f.out), f.in_) for s, f in adapters["task0"].items()}
    }
    assert errors(zero, Compressed("x", adapters, 0, 0.0)) == {"task0": 0.0}
    assert errors({"task0": {}}, Compressed("x", {"task0": {}}, 0, 0.0)) == {"task0": 0.0}


def test_by_task_undoes_by_site_and_keeps_the_order(pool: Pool) -> None:
    adapters: dict[str, Adapter] = {**pool(0, (2, 1)), "empty": {}}
    again = by_task(by_site(adapters), adapters)
    assert list(again) == list(adapters)
    assert {t: dict(a) for t, a in again.items()} == {t: dict(a) for t, a in adapters.items()}


def test_equal_rank_names_why_a_pool_does_not_fit(pool: Pool) -> None:
    assert equal_rank(pool(0, (2, 2)), "peer") == 2
    with pytest.raises(InapplicableError, match=r"peer takes adapters of one rank only, and these have \[1, 2\]"):
        equal_rank(pool(0, (2, 1)), "peer")
    uneven = pool(0, (2, 2))
    uneven["task1"] = {"block.0.query": uneven["task1"]["block.0.query"]}
    with pytest.raises(InapplicableError, match=r"lack 'block\.1\.value'"):
        equal_rank(uneven, "peer")


def test_one_adapter_for_all_is_kept_and_counted_once(pool: Pool) -> None:
    adapters = pool(0, (2, 2, 2))
    result = one_for_all("one", adapters["task0"], adapters, 1.0)
    assert result.numbers == 2 * 2 * (11 + 9)
    assert all(own is adapters["task0"] for own in result.stored.values())


def test_an_absent_library_is_named_with_what_to_install() -> None:
    with pytest.raises(ConfigError, match="needs 'no_such_peer': pip install no-such-peer==1"):
        optional_package("no_such_peer", "no-such-peer==1")
