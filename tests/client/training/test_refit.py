"""What newer bases capture of a gradient, learning coefficients again in them, and the noise of a comparison."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from share_client.trainer import BackboneTrainer
from share_client.training import Backbone, PreparedTask, TrainingOptions, TrainResult, train_in_space
from share_client.training.gradients import weight_gradients
from share_client.training.loop import fresh_head
from share_client.training.refit import (
    captured_share,
    compare,
    gradients_at,
    paired_noise,
    refit_in_space,
    usable_bases,
)
from share_core.fingerprint import describe_space
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import columns_of, task_adapter, update_adapter
from share_core.types import Factors, SiteBasis, SiteUpdate, Space, Update

SITE = "site"


def orthonormal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64)).Q
    return q


@pytest.mark.parametrize("seed", range(5))
def test_the_captured_share_is_that_of_the_projected_gradient(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    g = {SITE: torch.randn(9, 7, generator=draw)}
    left, right = orthonormal(9, 6, draw), orthonormal(7, 5, draw)
    shares = []
    for k_out, k_in in ((0, 0), (1, 2), (3, 2), (6, 5)):
        one, two = left[:, :k_out], right[:, :k_in]
        projected = one @ one.T @ g[SITE].double() @ two @ two.T
        shares.append(captured_share(g, {SITE: SiteBasis(one, two)}))
        assert shares[-1] == pytest.approx(float(projected.norm() / g[SITE].double().norm()) ** 2, abs=1e-9)
    assert shares[0] == 0.0
    assert shares == sorted(shares), "appending columns captured less"
    whole = SiteBasis(orthonormal(9, 9, draw), orthonormal(7, 7, draw))
    assert captured_share(g, {SITE: whole}) == pytest.approx(1.0)
    assert captured_share({SITE: torch.zeros(9, 7)}, {SITE: whole}) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_what_a_training_could_use_is_its_bases_and_its_own_directions(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    basis = SiteBasis(orthonormal(9, 2, draw).float(), orthonormal(7, 3, draw).float())
    free = Factors(torch.randn(9, 2, generator=draw), torch.randn(7, 2, generator=draw))
    usable = usable_bases({SITE: basis, "other": basis}, Update(0, {SITE: SiteUpdate(residual=free)}))
    assert columns_of(usable) == (2 + 2 + 3 + 2) + (2 + 3)
    for side, columns in ((usable[SITE].left, free.out), (usable[SITE].right, free.in_)):
        assert torch.allclose(side.T @ side, torch.eye(side.shape[1]), atol=1e-5)
        assert torch.allclose(side @ (side.T @ columns), columns, atol=1e-4)


def test_the_gradient_is_taken_where_the_adapter_is(backbone: Backbone, bars: PreparedTask) -> None:
    options = TrainingOptions.of(bars.config)
    head = {k: v.clone() for k, v in fresh_head(backbone, bars, 3, None).state_dict().items()}
    module = fresh_head(backbone, bars, 3, None)
    site = backbone.sites[0]
    place = backbone.site(site)
    shape = (place.d_out, place.d_in)
    draw = torch.Generator().manual_seed(1)
    change = Factors(torch.randn(shape[0], 2, generator=draw) / 3, torch.randn(shape[1], 2, generator=draw) / 3)
    plain = weight_gradients(backbone, bars, module, (site,), options)[site]
    assert torch.allclose(gradients_at(backbone, bars, {}, head, (site,), options)[site], plain, atol=1e-5)
    weight = place.module.weight
    assert isinstance(weight, Tensor)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += change.out @ change.in_.T
    try:
        moved = weight_gradients(backbone, bars, module, (site,), options)[site]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    found = gradients_at(backbone, bars, {site: change}, head, (site,), options)[site]
    assert torch.allclose(found, moved, atol=1e-4 * float(moved.abs().max()))
    assert not torch.allclose(found, plain, atol=1e-2 * float(moved.abs().max())), "the adapter makes no difference"


def stored(backbone: Backbone, *tasks: PreparedTask) -> tuple[Space, list[TrainResult]]:
    """Train tasks one after the other, each in the version that the one before left."""
    state = empty_state(describe_space("digits", backbone.site_weights()))
    results = []
    for task in tasks:
        results.append(
            train_in_space(backbone, task, state.space, f"org/{task.config.name}", TrainingOptions.of(task.config))
        )
        adapter = update_adapter(results[-1].update, state.space.bases)
        state = merge(state, f"org/{task.config.name}", adapter, MergePolicy(tau=0.05)).state
    return state.space, results


def test_a_refit_starts_from_what_is_stored_and_adds_no_directions(
    backbone: Backbone, bars: PreparedTask, inverted: PreparedTask
) -> None:
    space, (first, _) = stored(backbone, bars, inverted)
    options = replace(TrainingOptions.of(bars.config), epochs=1, pseudo_rank=1)
    still = refit_in_space(backbone, bars, space, "org/bars", replace(options, learning_rate=1e-9), None, first.head)
    assert all(part.residual is None for part in still.update.sites.values())
    before, after = task_adapter(space, "org/bars"), update_adapter(still.update, space.bases)
    for site, factors in before.items():
        kept, got = factors.out @ factors.in_.T, after[site].out @ after[site].in_.T
        assert torch.allclose(got.float(), kept, atol=1e-4 * float(kept.norm())), "a part of the stored core was cut"
    seen = compare(backbone, bars, (before, first.head), (after, still.head))
    assert seen.before == pytest.approx(seen.after)
    for budget in (None, 0.5):
        asked = replace(options, budget=budget)
        moved = refit_in_space(backbone, bars, space, "org/bars", asked, None, first.head)
        assert all(part.residual is None for part in moved.update.sites.values()), budget


def test_the_noise_is_that_of_the_rows_which_changed() -> None:
    draw = torch.Generator().manual_seed(2)
    n, better, worse = 400, 24, 10
    change = torch.zeros(n)
    change[torch.randperm(n, generator=draw)[: better + worse]] = torch.tensor([1.0] * better + [-1.0] * worse)
    mean = (better - worse) / n
    exact = math.sqrt(((better + worse) / n - mean**2) / n)
    assert paired_noise(lambda rows: float(change[rows].mean()), n, draws=1000) == pytest.approx(exact, rel=0.1)
    assert paired_noise(lambda rows: 0.25, n) == 0.0


def test_a_trainer_looks_at_the_gradient_before_it_refits(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", x=draw.random((24, 8, 8), dtype=np.float32), y=np.arange(24) % 3)
    file = tmp_path / "tasks.toml"
    file.write_text(
        'backbone = "digits-vit"\ndevice = "cpu"\n[[task]]\nname = "a"\nkind = "image-classification"\n'
        'train = "train.npz"\ntest = "test.npz"\nepochs = 1\nrefit = true\n'
    )
    trainer = BackboneTrainer(file)
    (task,) = trainer.tasks()
    state = empty_state(describe_space("digits", trainer.weights()))
    trained = trainer.train(task, state.space, "org/a", lambda step: None)
    assert 0 < trained.captured < 1
    assert trained.columns > 0
    space = merge(state, "org/a", update_adapter(trained.update, state.space.bases), MergePolicy(tau=0.05)).state.space
    # The bases hold what this training added and nothing else: nothing is to be had that was not to be had then.
    unmoved = trainer.refit(task, space, "org/a", trained.head, trained.captured, lambda step: None)
    assert unmoved.trained is None
    assert unmoved.captured == pytest.approx(trained.captured, rel=0.3)
    refit = trainer.refit(task, space, "org/a", trained.head, trained.captured / 10, lambda step: None)
    assert refit.trained is not None
    assert refit.trained.update.base_version == space.version
    assert 0 <= refit.noise < 1
