"""What stored tasks share, and how much of their mean is not noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_core import warm_start
from share_core.linalg import EXACT_BELOW, leading_right_vectors
from share_core.types import Core, Cores
from share_core.warm_start import common_share, shared_start


def core(seed: int, k: int = 12, rank: int = 3, scale: float = 1.0) -> Core:
    draw = torch.Generator().manual_seed(seed)
    return Core(scale * torch.randn(k, rank, generator=draw), torch.randn(k, rank, generator=draw))


def dense(one: Core) -> Tensor:
    return (one.out @ one.in_.T).double()


def test_nothing_stored_and_one_task_share_nothing() -> None:
    assert shared_start({}) == {}
    assert shared_start({"o/a": {"s": core(0)}}) == {}
    assert shared_start({"o/a": {}, "o/b": {"s": Core(torch.zeros(4, 1), torch.zeros(4, 1))}}) == {}


def test_tasks_that_agree_share_nearly_all() -> None:
    same = core(1)
    start = shared_start({f"o/{n}": {"s": same} for n in range(50)})["s"]
    assert torch.allclose(start, dense(same) * math.sqrt(1 - 1 / 50), rtol=1e-4, atol=1e-5)


def test_unrelated_tasks_share_little() -> None:
    tasks = {f"o/{n}": {"s": core(n, k=64)} for n in range(8)}
    norm = float(dense(core(0, k=64)).norm())
    start = shared_start(tasks)
    assert float(start["s"].norm() if "s" in start else 0.0) < 0.15 * norm


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 20), st.floats(0.0, 3.0), st.integers(0, 1000))
def test_the_squared_norm_of_the_start_is_that_of_the_common_part(count: int, common: float, seed: int) -> None:
    """On average over the noise: so the slow way, a common matrix plus noise, drawn many times."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    truth *= common / truth.norm()
    noise = torch.randn(100, count, 6, 6, generator=draw, dtype=torch.float64)
    drawn = truth + noise
    mean = drawn.mean(dim=1)
    square, of_mean = drawn.square().sum(dim=(2, 3)).mean(dim=1), mean.square().sum(dim=(1, 2))
    left = (of_mean - square / count).mean()  # what the formula keeps, before negative values are cut off
    expected = common**2 * (1 - 1 / count)
    assert abs(float(left) - expected) < 0.3 * (36 / count + common**2)
    kept = [common_share(float(a), float(b), count) for a, b in zip(square, of_mean, strict=True)]
    assert all(0 <= k <= 1 for k in kept)


def check_numbers_buy_no_weight(start: Callable[[Mapping[str, Cores]], dict[str, Tensor]] = shared_start) -> None:
    tasks = {f"o/{n}": {"s": core(n % 2)} for n in range(6)}
    loud = {**tasks, "o/1": {"s": core(1, scale=1e6)}}
    torch.testing.assert_close(start(loud)["s"], start(tasks)["s"], rtol=1e-5, atol=1e-6)


def test_large_numbers_buy_no_weight() -> None:
    check_numbers_buy_no_weight()


def test_a_site_that_a_task_leaves_out_counts_as_zero() -> None:
    tasks: dict[str, Cores] = {f"o/{n}": {"s": core(1), "t": core(2)} for n in range(4)}
    zero = Core(torch.zeros(12, 3), torch.zeros(12, 3))
    left_out = shared_start({**tasks, "o/9": {"t": core(2)}})["s"]
    torch.testing.assert_close(left_out, shared_start({**tasks, "o/9": {"t": core(2), "s": zero}})["s"])


@pytest.mark.parametrize(
    ("name", "bug", "check"),
    [
        ("median", max, check_numbers_buy_no_weight),
        ("common_share", lambda square, of_mean, count: 1.0, test_nothing_stored_and_one_task_share_nothing),
        ("common_share", lambda square, of_mean, count: 1.0, test_unrelated_tasks_share_little),
        (
            "_dense",
            lambda one: (one.in_ @ one.out.T).double(),
            test_tasks_that_agree_share_nearly_all,
        ),
    ],
)
def test_planted_bug_is_caught(name: str, bug: Any, check: Callable[[], None]) -> None:
    with mock.patch.object(warm_start, name, bug), pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("shape", [(560, 520), (520, 600), (40, 30)])
def test_leading_vectors_are_those_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    """Random restriction against the whole SVD, on a spectrum that falls as a gradient's does."""
    draw = torch.Generator().manual_seed(3)
    assert min(shape) > EXACT_BELOW or min(shape) < 100
    u = torch.linalg.qr(torch.randn(shape[0], 25, generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(shape[1], 25, generator=draw, dtype=torch.float64)).Q
    x = (u * 0.7 ** torch.arange(25)) @ v.T
    vectors, values = leading_right_vectors(x, 4)
    whole = torch.linalg.svd(x)
    torch.testing.assert_close(values, whole.S[:4], rtol=1e-6, atol=0)
    overlap = (vectors.T @ whole.Vh[:4].T).abs()
    torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    again, _ = leading_right_vectors(x, 4)
    assert torch.equal(vectors, again)
