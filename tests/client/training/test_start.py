"""Where training in a space starts, and what the gradient says of a site.

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
from share_client.training import gradients as gradients_module
from share_client.training import start as start_module
from share_client.training.factors import IN_NORM
from share_client.training.gradients import SiteGradient, grouped, seen_by, site_gradients
from share_client.training.loop import fresh_head
from share_client.training.start import _filled as filled
from share_client.training.start import free_directions, start_cores
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
    torch.manual_seed(kept)
    right = torch.linalg.qr(torch.randn(64, 64)).Q[:, :kept]
    gradient = torch.randn(32, 1) @ torch.randn(1, 64) + torch.randn(32, kept) @ right.T
    basis = SiteBasis(torch.zeros(32, 0), right)
    free = free_directions({"s": seen_by(basis, gradient, 4)}, {"s": basis}, {"s": 4})["s"]
    assert (right.T @ free).abs().max() < 1e-5 if kept else True
    torch.testing.assert_close(free.T @ free, IN_NORM**2 * torch.eye(4), atol=1e-5, rtol=1e-5)
    outside = gradient - gradient @ right @ right.T
    seen = free_directions({"s": seen_by(basis, gradient, 4)}, {"s": SiteBasis(basis.left, right[:, :0])}, {"s": 1})
    assert (right.T @ seen["s"]).abs().max() < 1e-5 if kept else True, "what the gradient says lies outside already"
    captured = torch.linalg.matrix_norm(outside @ free[:, :1] / IN_NORM) / torch.linalg.matrix_norm(outside)
    assert captured > 0.999, "the gradient outside has one direction, and the first start must be it"


def test_a_zero_gradient_still_gives_directions_outside() -> None:
    torch.manual_seed(0)
    basis = SiteBasis(torch.zeros(32, 0), torch.linalg.qr(torch.randn(64, 3)).Q)
    free = free_directions({"s": seen_by(basis, torch.zeros(32, 64), 2)}, {"s": basis}, {"s": 2})["s"]
    assert (basis.right.T @ free).abs().max() < 1e-5
    torch.testing.assert_close(free.T @ free, IN_NORM**2 * torch.eye(2), atol=1e-5, rtol=1e-5)


def gradients_of(space: Space, seed: int) -> dict[str, SiteGradient]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {site: (basis.left.shape[0], basis.right.shape[0]) for site, basis in space.bases.items()}
    return {s: seen_by(space.bases[s], torch.randn(shape, generator=draw), 4) for s, shape in shapes.items()}


@pytest.mark.parametrize("gradients", [True, False])
def test_a_first_task_starts_at_zero(grown: Space, gradients: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    found = start_cores(grown, "o/new", 8, gradients_of(grown, 1) if gradients else {}, draw)
    for core in found.values():
        assert not core.out.any(), "one stored task says nothing about another"
        product = core.in_.T @ core.in_
        torch.testing.assert_close(product, IN_NORM**2 * torch.eye(core.rank), atol=1e-4, rtol=1e-4)


def test_a_new_task_starts_from_what_the_stored_ones_share(grown: Space) -> None:
    own = grown.cores["o/bars"]
    many = replace(grown, cores={f"o/{n}": own for n in range(4)})
    gradients = gradients_of(grown, 1)
    site = max(grown.bases, key=lambda s: grown.bases[s].k_in)
    assert grown.bases[site].k_in > 2
    u, s, vh = torch.linalg.svd(shared_start(many.cores)[site].float())
    for rank, kept in ((2, 1), (8, len(s))):
        start = start_cores(many, "o/new", rank, gradients, torch.Generator())[site]
        made = start.out @ start.in_.T
        torch.testing.assert_close(made, u[:, :kept] * s[:kept] @ vh[:kept], atol=1e-5, rtol=1e-4)
        assert float(made.norm()) > 0
    blind = start_cores(many, "o/new", 8, {}, torch.Generator())
    assert not any(core.out.any() for core in blind.values()), "beside noise a new task starts at zero"


def test_free_columns_of_a_core_follow_the_gradient(grown: Space) -> None:
    gradients = gradients_of(grown, 2)
    for site, core in start_cores(grown, "o/new", 2, gradients, torch.Generator()).items():
        inside = gradients[site].inside.float()
        best = torch.linalg.svdvals(inside)[: core.rank].norm()
        torch.testing.assert_close((inside @ core.in_ / IN_NORM).norm(), best, atol=1e-4, rtol=1e-4)


def test_a_stored_task_starts_from_its_own_core(grown: Space) -> None:
    own = grown.cores["o/bars"]
    two = replace(grown, cores={"o/bars": own, "o/other": {s: Core(-c.out, c.in_) for s, c in own.items()}})
    for gradients in ({}, gradients_of(grown, 3)):
        start = start_cores(two, "o/bars", 8, gradients, torch.Generator())
        for site, core in start.items():
            torch.testing.assert_close(core.out @ core.in_.T, own[site].out @ own[site].in_.T, atol=1e-5, rtol=1e-5)


def test_gradients_of_groups_are_those_of_all_sites(backbone: Backbone, bars: PreparedTask, grown: Space) -> None:
    head = fresh_head(backbone, bars, 0, None)
    whole = site_gradients(backbone, bars, head, grown.bases, 2, OPTIONS)
    sizes = [backbone.site(site).d_out * backbone.site(site).d_in for site in grown.bases]
    assert len(list(grouped(backbone, tuple(grown.bases), max(sizes)))) == len(sizes) > 1
    with mock.patch.object(gradients_module, "GROUP_NUMBERS", 1):
        single = site_gradients(backbone, bars, head, grown.bases, 2, OPTIONS)
    for site, one in whole.items():
        torch.testing.assert_close(one.inside, single[site].inside)
        torch.testing.assert_close(one.strengths, single[site].strengths)
        assert 0 <= one.captured <= 1


def _reversed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = small_svd(x)
    return u.flip(1), s.flip(0), v.flip(1)


def _without_gradient(start: Any, basis: SiteBasis, rank: int, gradient: Any, draw: torch.Generator) -> Core:
    return filled(start, basis, rank, None, draw)


def _directions(grown: Space) -> None:
    test_free_directions_are_orthogonal_to_the_subspace(3)


def _no_gradient(grown: Space) -> None:
    test_a_zero_gradient_still_gives_directions_outside()


def _saddle(grown: Space) -> None:
    test_a_first_task_starts_at_zero(grown, True)


def _unchanged(basis: Tensor, x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("module", "where", "bug", "check"),
    [
        (start_module, "residual", _unchanged, _no_gradient),
        (gradients_module, "residual", _unchanged, _directions),
        (start_module, "_orthonormal_after", torch.zeros_like, _saddle),
        (start_module, "shared_start", lambda cores: {}, test_a_new_task_starts_from_what_the_stored_ones_share),
        (start_module, "small_svd", _reversed, test_a_new_task_starts_from_what_the_stored_ones_share),
        (start_module, "_filled", _without_gradient, test_free_columns_of_a_core_follow_the_gradient),
    ],
)
def test_planted_bug_is_caught(module: Any, where: str, bug: Any, check: Callable[[Space], None], grown: Space) -> None:
    check(grown)
    with mock.patch.object(module, where, bug), pytest.raises(AssertionError):
        check(grown)
