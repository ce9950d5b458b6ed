"""DP-SGD and noise on coefficients: gradients of single rows, what is clipped, where noise goes, what is refused.

The last tests plant bugs and show that the checks above catch them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from share_client.noise import system_normal, system_sample, system_uniform
from share_client.privacy_table import PrivacyConfig
from share_client.tasks_file import TaskConfig, tasks_from_toml
from share_client.training import (
    Backbone,
    PreparedTask,
    TrainingOptions,
    declare,
    evaluate,
    in_space,
    private,
    total_epsilon,
    train_in_space,
)
from share_client.training.factors import SpaceFactors
from share_client.training.gradients import site_gradients
from share_client.training.inject import adapted, injected
from share_client.training.loop import Trained, adamw, fresh_head
from share_client.training.private import PrivateLinear
from share_client.training.start import free_directions, random_directions
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.merge import MergePolicy, empty_state, merge
from share_core.privacy import CoefficientNoise, SampleNoise
from share_core.space import empty_space, update_adapter
from share_core.types import Core, SiteBasis, Space

opacus = pytest.importorskip("opacus", reason="DP-SGD needs the extra privacy")
OPTIONS = TrainingOptions(epochs=2, batch_size=48)


@pytest.fixture(scope="module")
def empty(backbone: Backbone) -> Space:
    return empty_space(describe_space("digits-vit", backbone.site_weights()))


@pytest.fixture(scope="module")
def grown(backbone: Backbone, bars: PreparedTask, empty: Space) -> Space:
    made = train_in_space(backbone, bars, empty, "o/bars", TrainingOptions(epochs=2))
    state = empty_state(describe_space("digits-vit", backbone.site_weights()))
    return merge(state, "o/bars", update_adapter(made.update, empty.bases), MergePolicy(tau=0.0)).state.space


def sample_noise(noise: float, norm: float = 1.0, steps: int = 8, rate: float = 0.25) -> SampleNoise:
    return SampleNoise(1.0, 1e-4, noise, norm, steps, rate)


def change_of(basis: SiteBasis, seed: int, phi: int = 2) -> SpaceFactors:
    draw = torch.Generator().manual_seed(seed)
    rank = min(3, basis.k_out, basis.k_in)
    core = Core(torch.randn(basis.k_out, rank, generator=draw), torch.randn(basis.k_in, rank, generator=draw))
    change = SpaceFactors(basis, core, torch.randn(basis.right.shape[0], phi, generator=draw))
    torch.nn.init.normal_(change.free_out, generator=draw)
    return change


def test_four_linear_maps_are_the_change_they_stand_for(backbone: Backbone, grown: Space, empty: Space) -> None:
    for space in (grown, empty):
        for site, basis in space.bases.items():
            change = change_of(basis, 3)
            linear = PrivateLinear(backbone.site(site), change)
            x = torch.randn(5, 7, basis.right.shape[0], generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(linear(x), adapted(backbone.site(site), change)(x), rtol=1e-4, atol=1e-4)
            other = change_of(basis, 9)
            linear.write_to(other)
            torch.testing.assert_close(
                other.factors()[0] @ other.factors()[1].T, change.factors()[0] @ change.factors()[1].T
            )
            assert [r.multiple for r in linear.rated(change)] == [
                r.multiple for r in change.rated() if r.parameter.numel()
            ]


def row_gradients(backbone: Backbone, task: PreparedTask, space: Space, rows: list[int]) -> list[Tensor]:
    """Return what Opacus says of some rows, and compare it with one backward pass for each row."""
    changes = {site: change_of(basis, 5) for site, basis in space.bases.items()}
    modules = {site: PrivateLinear(backbone.site(site), changes[site]) for site in changes}
    head = fresh_head(backbone, task, 0, None)
    parameters = [*head.parameters(), *(r.parameter for s, a in modules.items() for r in a.rated(changes[s]))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    with injected(backbone, modules):
        hooks, _ = private._opacus(private._Model(backbone, head), optimizer, sample_noise(1.0), 4.0)
        private._row_gradients(backbone, task, head, rows, parameters)
        got = [parameter.grad_sample for parameter in parameters]  # type: ignore[attr-defined]
        hooks.cleanup()
        for place, row in enumerate(rows):
            inputs, targets = task.train.batch([row], backbone.device)
            loss = task.kind.loss(head(backbone.features(inputs)), targets)
            for samples, wanted in zip(got, torch.autograd.grad(loss, parameters), strict=True):
                torch.testing.assert_close(samples[place], wanted, rtol=1e-3, atol=1e-5)
    return got


def test_the_gradient_of_every_row_is_its_own(backbone: Backbone, bars: PreparedTask, grown: Space) -> None:
    got = row_gradients(backbone, bars, grown, [0, 17, 5])
    assert {len(samples) for samples in got} == {3}


def summed(
    backbone: Backbone, task: PreparedTask, space: Space, noise: Callable[[tuple[int, ...]], Tensor], sample: list[int]
) -> list[list[Tensor]]:
    """Train two steps with chosen noise and rows; return every gradient that the optimizer saw."""
    seen: list[list[Tensor]] = []
    plain = adamw

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = plain(*arguments)
        optimizer.register_step_pre_hook(
            lambda one, *_: seen.append([p.grad.clone() for g in one.param_groups for p in g["params"]])
        )
        return optimizer

    with (
        mock.patch.object(private, "adamw", watched),
        mock.patch.object(private, "system_normal", noise),
        mock.patch.object(private, "system_sample", lambda rows, rate: sample),
    ):
        declared = sample_noise(2.0, norm=0.01, steps=2)
        train_in_space(backbone, task, space, "o/new", OPTIONS, declared=declared)
    return seen


def zeros(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def ones(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def norm_of(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def check_one_row_moves_at_most_the_clip(backbone: Backbone, task: PreparedTask, space: Space) -> None:
    expected = sample_noise(1.0).sample_rate * task.train_rows
    for gradients in summed(backbone, task, space, zeros, [3]):
        assert 0 < norm_of(gradients) * expected <= 0.01 * (1 + 1e-4)


def check_noise_is_in_every_gradient(backbone: Backbone, task: PreparedTask, space: Space) -> None:
    """With noise of one everywhere and no rows, every gradient is noise_multiplier * max_grad_norm / expected rows."""
    expected = sample_noise(1.0).sample_rate * task.train_rows
    seen = summed(backbone, task, space, ones, [])
    assert len(seen) == 2
    for gradients in seen:
        for gradient in gradients:
            torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0 * 0.01 / expected))


def check_starts_tell_nothing(backbone: Backbone, task: PreparedTask, space: Space) -> None:
    """What DP-SGD starts from is the same for other rows: only the noisy steps know the data."""
    other = replace(task, train=task.test)
    starts = []
    for one in (task, other):
        with mock.patch.object(in_space, "train_private", lambda *a: Trained(0.0, 0)):
            made = train_in_space(
                backbone, one, space, "o/new", replace(OPTIONS, directions=2), declared=sample_noise(1.0)
            )
        starts.append(made)
    with mock.patch.object(in_space, "SpaceFactors", wraps=SpaceFactors) as factors:
        for one in (task, other):
            with mock.patch.object(in_space, "train_private", lambda *a: Trained(0.0, 0)):
                train_in_space(backbone, one, space, "o/new", OPTIONS, declared=sample_noise(1.0))
    calls = [call.args[2] for call in factors.call_args_list]
    half = len(calls) // 2
    for a, b in zip(calls[:half], calls[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(starts[0].head.values(), starts[1].head.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_noise_is_new_each_time(backbone: Backbone, task: PreparedTask, space: Space) -> None:
    declared = sample_noise(1.0, steps=2)
    with mock.patch.object(private, "system_sample", lambda rows, rate: [0, 1]):  # only the noise is looked at
        heads = [train_in_space(backbone, task, space, "o/new", OPTIONS, declared=declared).head for _ in range(2)]
    assert not torch.equal(heads[0]["weight"], heads[1]["weight"]), "noise from the seed can be taken away again"


CHECKS = (
    check_one_row_moves_at_most_the_clip,
    check_noise_is_in_every_gradient,
    check_starts_tell_nothing,
    check_noise_is_new_each_time,
)


@pytest.mark.parametrize("check", CHECKS)
def test_dp_sgd(check: Callable[..., None], backbone: Backbone, bars: PreparedTask, grown: Space) -> None:
    before = backbone.site_weights()
    check(backbone, bars, grown)
    for site, weight in backbone.site_weights().items():
        assert torch.equal(weight, before[site])


@contextmanager
def planted(bug: str) -> Iterator[None]:
    honest = private._opacus

    def opacus_with(model: Any, plain: Any, declared: SampleNoise, expected: float) -> tuple[Any, Any]:
        hooks, optimizer = honest(model, plain, declared, expected)
        if bug == "no clipping":
            optimizer.max_grad_norm = 1e9
        elif bug == "the head has no noise":
            add = optimizer.add_noise

            def without_head() -> None:
                add()
                optimizer.params[0].grad = optimizer.params[0].summed_grad

            optimizer.add_noise = without_head
        return hooks, optimizer

    seeded = torch.Generator().manual_seed(0)
    patches: dict[str, list[Any]] = {
        "no clipping": [mock.patch.object(private, "_opacus", opacus_with)],
        "the head has no noise": [mock.patch.object(private, "_opacus", opacus_with)],
        "noise from the seed": [
            mock.patch.object(
                private,
                "system_normal",
                lambda shape: torch.randn(shape, generator=seeded.manual_seed(0), dtype=torch.float64),
            ),
        ],
    }
    for patch in patches[bug]:
        patch.start()
    try:
        yield
    finally:
        for patch in patches[bug]:
            patch.stop()


@pytest.mark.parametrize(
    ("bug", "check"),
    [
        ("no clipping", check_one_row_moves_at_most_the_clip),
        ("the head has no noise", check_noise_is_in_every_gradient),
        ("noise from the seed", check_noise_is_new_each_time),
    ],
)
def test_planted_bugs_are_caught(
    bug: str, check: Callable[..., None], backbone: Backbone, bars: PreparedTask, grown: Space
) -> None:
    with planted(bug), pytest.raises(AssertionError):
        check(backbone, bars, grown)


def test_starting_from_the_gradient_would_be_noticed(backbone: Backbone, bars: PreparedTask, grown: Space) -> None:
    tasks = iter([bars, replace(bars, train=bars.test)] * 2)

    def from_gradient(bases: Any, counts: dict[str, int], draw: torch.Generator) -> dict[str, Tensor]:
        task = next(tasks)
        head = fresh_head(backbone, task, 0, None)
        return free_directions(site_gradients(backbone, task, head, bases, 2, OPTIONS), bases, counts)

    with mock.patch.object(in_space, "random_directions", from_gradient), pytest.raises(AssertionError):
        check_starts_tell_nothing(backbone, bars, grown)


def test_little_noise_learns(backbone: Backbone, bars: PreparedTask, empty: Space) -> None:
    declared = sample_noise(0.3, steps=24, rate=0.25)
    made = train_in_space(backbone, bars, empty, "o/bars", replace(OPTIONS, epochs=6), declared=declared)
    assert (made.declared, made.steps) == (declared, 24)
    assert evaluate(backbone, bars, update_adapter(made.update, empty.bases), made.head).value >= 0.5


def test_noise_on_coefficients_sends_nothing_else(backbone: Backbone, inverted: PreparedTask, grown: Space) -> None:
    declared = CoefficientNoise(0.01, clip=5.0, delta=1e-6)
    made = train_in_space(backbone, inverted, grown, "o/inverted", OPTIONS, declared=declared)
    assert set(made.update.sites) == {s for s, b in grown.bases.items() if b.k_out and b.k_in}
    assert all(part.residual is None and part.core is not None for part in made.update.sites.values())
    assert made.update.head == {}


@pytest.mark.parametrize("wish", ["directions", "head", "empty"])
def test_what_would_leave_without_noise_is_refused(
    wish: str, backbone: Backbone, bars: PreparedTask, grown: Space, empty: Space
) -> None:
    declared = CoefficientNoise(1.0, 1.0, 1e-6)
    options = replace(OPTIONS, directions=2) if wish == "directions" else OPTIONS
    task = replace(bars, config=replace(bars.config, share_head=True)) if wish == "head" else bars
    with pytest.raises(ConfigError, match=r"noise on coefficients needs"):
        train_in_space(backbone, task, empty if wish == "empty" else grown, "o/x", options, declared=declared)


def test_random_directions_lie_outside_the_bases(grown: Space) -> None:
    for site, made in random_directions(
        grown.bases, dict.fromkeys(grown.bases, 2), torch.Generator().manual_seed(0)
    ).items():
        assert float((grown.bases[site].right.T @ made).abs().max()) < 1e-5
        assert made.shape[1] == 2


def task_with(**values: Any) -> TaskConfig:
    return TaskConfig("t", "image-classification", Path("a"), Path("b"), batch_size=32, privacy=PrivacyConfig(**values))


def test_a_training_declares_what_it_spends() -> None:
    declared = declare(task_with(epsilon=3.0), 1000)
    assert isinstance(declared, SampleNoise)
    assert declared.delta == 1 / 10_000
    assert (declared.steps, declared.sample_rate) == (96, 0.032)
    assert 2.99 <= declared.epsilon <= 3.0
    from opacus.accountants import RDPAccountant

    theirs = RDPAccountant()
    theirs.history = [(declared.noise_multiplier, declared.sample_rate, declared.steps)]
    assert declared.epsilon >= theirs.get_epsilon(declared.delta) - 1e-9, "never below Opacus' accountant"
    assert declared.epsilon == pytest.approx(theirs.get_epsilon(declared.delta), rel=0.02)
    twice = total_epsilon([declared, declared])
    assert declared.epsilon < twice < 2 * declared.epsilon
    assert total_epsilon([declared]) == pytest.approx(declared.epsilon)
    noise = declare(task_with(mechanism="coefficients", epsilon=2.0), 1000)
    assert isinstance(noise, CoefficientNoise)
    assert total_epsilon([noise]) <= 2.0
    assert total_epsilon([noise, declared]) > max(2.0, declared.epsilon)
    assert declare(replace(task_with(epsilon=3.0), privacy=None), 10) is None
    with pytest.raises(ConfigError, match="raise epsilon"):
        declare(task_with(epsilon=1e-9, delta=1e-12), 10)


def test_noise_is_normal_and_rows_are_drawn_at_the_rate() -> None:
    """Bounds of seven standard deviations: a right generator fails once in 10^11 runs."""
    count = 200_000
    drawn = system_normal((count,))
    assert abs(float(drawn.mean())) <= 7 / math.sqrt(count)
    assert abs(float(drawn.square().mean()) - 1) <= 7 * math.sqrt(2 / count)
    assert abs(float((drawn.abs() < 1).double().mean()) - 0.6827) <= 7 * math.sqrt(0.25 / count)
    assert system_normal(()).shape == ()
    assert system_normal((0, 4)).shape == (0, 4)
    uniform = system_uniform(1000)
    assert 0 < float(uniform.min()) <= float(uniform.max()) <= 1
    rows = system_sample(count, 0.1)
    assert abs(len(rows) / count - 0.1) <= 7 * math.sqrt(0.09 / count)
    assert rows == sorted(set(rows))
    assert system_sample(5, 1.0) == [0, 1, 2, 3, 4]


BASE = """
backbone = "digits-vit"
{privacy}
[[task]]
name = "one"
kind = "image-classification"
train = "a.npz"
test = "a.npz"
{more}
"""


def read(tmp_path: Path, privacy: str = "", more: str = "") -> TaskConfig:
    (tmp_path / "a.npz").touch()
    return tasks_from_toml(BASE.format(privacy=privacy, more=more), tmp_path / "tasks.toml").tasks[0]


def test_the_table_is_for_all_tasks_or_for_one(tmp_path: Path) -> None:
    assert read(tmp_path).privacy is None
    for_all = "[privacy]\nepsilon = 4\n"
    assert read(tmp_path, for_all).privacy == PrivacyConfig(epsilon=4.0)
    own = '[task.privacy]\nmechanism = "coefficients"\nnoise_multiplier = 2.0\nclip = 3\nbudget = 9'
    wanted = PrivacyConfig(mechanism="coefficients", noise_multiplier=2.0, clip=3.0, budget=9.0)
    assert read(tmp_path, for_all, own).privacy == wanted
    assert (PrivacyConfig(epsilon=2.0).limit, PrivacyConfig(noise_multiplier=1.0).limit, wanted.limit) == (
        2.0,
        None,
        9.0,
    )


@pytest.mark.parametrize(
    ("privacy", "more", "says"),
    [
        ("privacy = 3", "", "expected a table"),
        ("[privacy]", "", "got neither"),
        ("[privacy]\nepsilon = 1\nnoise_multiplier = 1", "", "got both"),
        ("[privacy]\nepsilon = 0", "", "epsilon: expected a number above"),
        ("[privacy]\nepsilon = 1\nclip = 1", "", "clip: has no meaning"),
        ('[privacy]\nmechanism = "coefficients"\nepsilon = 1\nmax_grad_norm = 1', "", "max_grad_norm: has no meaning"),
        ('[privacy]\nmechanism = "laplace"\nepsilon = 1', "", "expected one of dp-sgd, coefficients"),
        ("[privacy]\nepsilon = 1\ndelta = 0.5", "", "delta: expected a number"),
        ("[privacy]\nepsilom = 1", "", "did you mean 'epsilon'"),
        ('[privacy]\nmechanism = "coefficients"\nepsilon = 1', "directions = 2", "directions: expected 0"),
        ('[privacy]\nmechanism = "coefficients"\nepsilon = 1', "share_head = true", "share_head: expected false"),
    ],
)
def test_mistakes_in_the_table_are_named(privacy: str, more: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, privacy, more)
