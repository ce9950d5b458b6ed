"""Where training in a space starts.

The last test plants bugs and shows that the checks above it catch them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from share_client.training import Backbone, PreparedTask, TrainingOptions, train_in_space
from share_client.training import start as start_module
from share_client.training.factors import IN_NORM
from share_client.training.start import random_directions, start_cores
from share_core.fingerprint import describe_space
from share_core.linalg import small_svd
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import update_adapter
from share_core.types import Core, SiteBasis, Space
from share_core.warm_start import shared_start

OPTIONS = TrainingOptions(epochs=1, directions=4)


@pytest.fixture(scope="module")
def grown(backbone: Backbone, bars: PreparedTask) -> Space:
    """A version that holds the task o/bars."""
    state = empty_state(describe_space("digits-vit", backbone.site_weights()))
    made = train_in_space(backbone, bars, state.space, "o/bars", OPTIONS)
    adapter = update_adapter(made.update, state.space.bases)
    return merge(state, "o/bars", adapter, MergePolicy(tau=0.0)).state.space


@pytest.mark.parametrize("kept", [0, 3, 60])
def test_free_directions_are_orthogonal_to_the_subspace(kept: int) -> None:
    right = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(kept))).Q[:, :kept]
    basis = SiteBasis(torch.zeros(32, 0), right)
    free = random_directions({"s": basis}, {"s": 4}, torch.Generator().manual_seed(1))["s"]
    assert (right.T @ free).abs().max() < 1e-5 if kept else True
    torch.testing.assert_close(free.T @ free, IN_NORM**2 * torch.eye(4), atol=1e-5, rtol=1e-5)
    again = random_directions({"s": basis}, {"s": 4}, torch.Generator().manual_seed(1))["s"]
    assert torch.equal(free, again)


def test_a_first_task_starts_at_zero(grown: Space) -> None:
    for core in start_cores(grown, "o/new", 8, torch.Generator().manual_seed(0)).values():
        assert not core.out.any(), "one stored task says nothing about another"
        product = core.in_.T @ core.in_
        torch.testing.assert_close(product, IN_NORM**2 * torch.eye(core.rank), atol=1e-4, rtol=1e-4)


def test_a_new_task_starts_from_what_the_stored_ones_share(grown: Space) -> None:
    own = grown.cores["o/bars"]
    many = replace(grown, cores={f"o/{n}": own for n in range(4)})
    site = max(grown.bases, key=lambda s: grown.bases[s].k_in)
    assert grown.bases[site].k_in > 2
    u, s, vh = torch.linalg.svd(shared_start(many.cores)[site].float())
    for rank, kept in ((2, 1), (8, len(s))):
        start = start_cores(many, "o/new", rank, torch.Generator())[site]
        made = start.out @ start.in_.T
        torch.testing.assert_close(made, u[:, :kept] * s[:kept] @ vh[:kept], atol=1e-5, rtol=1e-4)
        assert float(made.norm()) > 0
    cold = start_cores(many, "o/new", 8, torch.Generator(), warm=False)
    assert not any(core.out.any() for core in cold.values()), "beside noise a new task starts at zero"


def test_a_stored_task_starts_from_its_own_core(grown: Space) -> None:
    own = grown.cores["o/bars"]
    two = replace(grown, cores={"o/bars": own, "o/other": {s: Core(-c.out, c.in_) for s, c in own.items()}})
    for warm in (True, False):
        for site, core in start_cores(two, "o/bars", 8, torch.Generator(), warm).items():
            torch.testing.assert_close(core.out @ core.in_.T, own[site].out @ own[site].in_.T, atol=1e-5, rtol=1e-5)


def _reversed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = small_svd(x)
    return u.flip(1), s.flip(0), v.flip(1)


def _directions(grown: Space) -> None:
    test_free_directions_are_orthogonal_to_the_subspace(3)


@pytest.mark.parametrize(
    ("where", "bug", "check"),
    [
        ("residual", lambda basis, x: x, _directions),
        ("_orthonormal_after", torch.zeros_like, test_a_first_task_starts_at_zero),
        ("shared_start", lambda cores: {}, test_a_new_task_starts_from_what_the_stored_ones_share),
        ("small_svd", _reversed, test_a_new_task_starts_from_what_the_stored_ones_share),
    ],
)
def test_planted_bug_is_caught(where: str, bug: Any, check: Callable[[Space], None], grown: Space) -> None:
    check(grown)
    with mock.patch.object(start_module, where, bug), pytest.raises(AssertionError):
        check(grown)
