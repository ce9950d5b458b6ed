"""Training in a space: what it learns, what it exports, and that the backbone stays as it was.

The last test plants bugs and shows that the checks above it catch them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from share_client.backbones.places import Place
from share_client.training import (
    Backbone,
    PreparedTask,
    Progress,
    TrainingOptions,
    TrainResult,
    evaluate,
    in_space,
    inject,
    load_backbone,
    train_in_space,
    train_lora,
)
from share_client.training.factors import IN_NORM, SpaceFactors, rate_for
from share_client.training.in_space import canonical_factors
from share_client.training.inject import AdaptedLinear, adapted, injected
from share_client.training.loop import train
from share_core.errors import ConfigError, SpaceMismatchError
from share_core.fingerprint import describe_space
from share_core.linalg import product_norm
from share_core.merge import HubState, MergePolicy, empty_state, merge
from share_core.space import compress_core, empty_space, task_adapter, update_adapter
from share_core.types import Adapter, Core, SiteBasis, Space

OPTIONS = TrainingOptions(epochs=4)
POLICY = MergePolicy(tau=0.0)


@pytest.fixture(scope="module")
def empty(backbone: Backbone) -> Space:
    return empty_space(describe_space("digits-vit", backbone.site_weights()))


@pytest.fixture(scope="module")
def first(backbone: Backbone, bars: PreparedTask, empty: Space) -> TrainResult:
    return train_in_space(backbone, bars, empty, "o/bars", OPTIONS)


@pytest.fixture(scope="module")
def merged(backbone: Backbone, first: TrainResult, empty: Space) -> HubState:
    """The hub's state after the first task."""
    state = empty_state(describe_space("digits-vit", backbone.site_weights()))
    return merge(state, "o/bars", update_adapter(first.update, empty.bases), POLICY).state


@pytest.fixture(scope="module")
def grown(merged: HubState) -> Space:
    """Version 1."""
    return merged.space


@pytest.fixture(scope="module")
def second(backbone: Backbone, inverted: PreparedTask, grown: Space) -> TrainResult:
    return train_in_space(backbone, inverted, grown, "o/inverted", OPTIONS)


def outputs_with_weights(backbone: Backbone, adapter: Adapter, task: PreparedTask) -> Tensor:
    """Return features of the test rows with dW written into the weights, and put the weights back."""
    inputs, _ = task.test.batch(range(task.test_rows), backbone.device)
    kept = {site: backbone.site(site).matrix().detach().clone() for site in adapter}
    try:
        for site, factors in adapter.items():
            backbone.site(site).matrix().add_((factors.out @ factors.in_.T).float())
        return backbone.features(inputs)
    finally:
        for site, weight in kept.items():
            backbone.site(site).matrix().copy_(weight)


def test_first_task_trains_free_directions_only(first: TrainResult) -> None:
    assert first.update.base_version == 0
    assert all(part.core is None for part in first.update.sites.values())
    assert {part.residual.rank for part in first.update.sites.values() if part.residual} == {4}
    assert first.update.head == {}


def test_both_tasks_are_learned_far_above_chance(
    backbone: Backbone,
    bars: PreparedTask,
    inverted: PreparedTask,
    first: TrainResult,
    second: TrainResult,
    empty: Space,
    grown: Space,
) -> None:
    chance = 0.25
    for task, result, space in ((bars, first, empty), (inverted, second, grown)):
        got = evaluate(backbone, task, update_adapter(result.update, space.bases), result.head)
        assert (got.metric, got.rows) == ("accuracy", 96)
        assert got.value > 2 * chance


def test_second_task_sends_coefficients_and_directions(second: TrainResult, grown: Space) -> None:
    assert second.update.base_version == 1
    assert sum(plan.directions for plan in second.plan.values()) > 0
    for site, part in second.update.sites.items():
        basis = grown.bases[site]
        assert part.core is not None
        assert part.core.out.shape == (basis.k_out, min(8, basis.k_out))
        assert (part.residual.rank if part.residual else 0) == second.plan[site].directions


def test_trained_forward_is_that_of_the_merged_weights(
    backbone: Backbone, inverted: PreparedTask, second: TrainResult, merged: HubState, grown: Space
) -> None:
    """The exported update and what the hub stores of it, injected, act as dW added to the weights does."""
    adapter = update_adapter(second.update, grown.bases)
    expected = outputs_with_weights(backbone, adapter, inverted)
    state = merge(merged, "o/inverted", adapter, POLICY).state
    stored = task_adapter(state.space, "o/inverted")
    inputs, _ = inverted.test.batch(range(inverted.test_rows), backbone.device)
    for some in (adapter, stored):
        frozen = {
            site: adapted(backbone.site(site), _Given(some[site].out.float(), some[site].in_.float())) for site in some
        }
        with injected(backbone, frozen), torch.inference_mode():
            got = backbone.features(inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    plain = backbone.features(inputs)
    assert (plain - expected).abs().max() > 0.1, "the adapter changes nothing, so the comparison shows nothing"


class _Given(SpaceFactors):
    """Factors as they are; built without the base class, which wants bases."""

    def __init__(self, out: Tensor, in_: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.given = (out, in_)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.given


def test_gradient_reaches_every_part() -> None:
    """The gradient of each factor equals that of a full matrix dW, carried through the factors."""
    torch.manual_seed(0)
    basis = SiteBasis(torch.linalg.qr(torch.randn(9, 3)).Q, torch.linalg.qr(torch.randn(7, 3)).Q)
    change = SpaceFactors(basis, Core(torch.randn(3, 2), torch.randn(3, 2)), torch.randn(7, 2))
    torch.nn.init.normal_(change.free_out)
    base = torch.nn.Linear(7, 9)
    x, wanted = torch.randn(5, 7), torch.randn(5, 9)
    ((AdaptedLinear(base, change)(x) - wanted) ** 2).sum().backward()
    out, in_ = change.factors()
    full = (out @ in_.T).detach().requires_grad_(True)
    ((base(x) + x @ full.T - wanted) ** 2).sum().backward()
    assert full.grad is not None
    expected = {
        "core_out": basis.left.T @ full.grad @ basis.right @ change.core_in,
        "core_in": basis.right.T @ full.grad.T @ basis.left @ change.core_out,
        "free_out": full.grad @ change.free_in,
        "free_in": full.grad.T @ change.free_out,
    }
    for name, gradient in expected.items():
        torch.testing.assert_close(change.get_parameter(name).grad, gradient.detach(), rtol=1e-4, atol=1e-4)


def everything(backbone: Backbone) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in backbone.module.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_leaves_the_backbone_bit_equal(backbone: Backbone, bars: PreparedTask, grown: Space) -> None:
    before, modules = everything(backbone), list(backbone.module.modules())
    short = replace(OPTIONS, epochs=1)
    train_in_space(backbone, bars, grown, "o/bars", short)
    train_lora(backbone, bars, 8, short)
    assert same(before, everything(backbone))
    assert all(a is b for a, b in zip(modules, backbone.module.modules(), strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in backbone.module.parameters())


def test_training_that_is_interrupted_leaves_the_backbone_bit_equal(
    backbone: Backbone, bars: PreparedTask, grown: Space
) -> None:
    before = everything(backbone)

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_space(backbone, bars, grown, "o/bars", OPTIONS, stop)
    assert same(before, everything(backbone))


def test_training_is_deterministic_and_keeps_the_callers_random_numbers(
    backbone: Backbone, bars: PreparedTask, grown: Space
) -> None:
    short = replace(OPTIONS, epochs=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a = train_in_space(backbone, bars, grown, "o/x", short)
    assert torch.equal(torch.rand(1), expected)
    b = train_in_space(backbone, bars, grown, "o/x", short)
    c = train_in_space(backbone, bars, grown, "o/x", replace(short, seed=1))
    assert same(a.head, b.head)
    assert not same(a.head, c.head)


def test_progress_counts_every_step(backbone: Backbone, bars: PreparedTask, empty: Space) -> None:
    seen: list[Progress] = []
    result = train_in_space(backbone, bars, empty, "o/x", replace(OPTIONS, epochs=2), seen.append)
    assert [p.step for p in seen] == list(range(1, 13))
    assert (seen[-1].epoch, seen[-1].steps, result.steps) == (2, 12, 12)
    assert result.loss == seen[-1].loss


def test_no_directions_and_no_subspace_changes_nothing(backbone: Backbone, bars: PreparedTask, empty: Space) -> None:
    result = train_in_space(backbone, bars, empty, "o/x", replace(OPTIONS, epochs=1, directions=0))
    assert result.update.sites == {}
    assert result.trained_numbers == 0


def test_shared_head_travels_with_the_update(backbone: Backbone, bars: PreparedTask, empty: Space) -> None:
    sharing = replace(bars, config=replace(bars.config, share_head=True))
    result = train_in_space(backbone, sharing, empty, "o/x", replace(OPTIONS, epochs=1))
    assert same(result.update.head, result.head)


def test_one_adam_step_moves_core_and_free_direction_alike() -> None:
    """The rate of a core is scaled so that a step changes dW as much as a step on a LoRA factor does."""
    torch.manual_seed(0)
    for d, k in ((384, 16), (64, 12)):
        basis = SiteBasis(torch.linalg.qr(torch.randn(d, k)).Q, torch.linalg.qr(torch.randn(d, k)).Q)
        column = torch.linalg.qr(torch.randn(k, 1)).Q * IN_NORM
        step_core = 1e-3 * rate_for(k) * torch.sign(torch.randn(k, 1))
        step_free = 1e-3 * rate_for(d) * torch.sign(torch.randn(d, 1))
        core = product_norm(basis.left @ step_core, basis.right @ column)
        free = product_norm(step_free, torch.linalg.qr(torch.randn(d, 1)).Q * IN_NORM)
        torch.testing.assert_close(core, free, rtol=1e-4, atol=0)


def test_another_backbones_space_is_refused(backbone: Backbone, bars: PreparedTask, empty: Space) -> None:
    other = replace(empty, bases={"layer.0.query": next(iter(empty.bases.values()))})
    with pytest.raises(SpaceMismatchError, match=r"layer\.0\.query.*digits-vit.*tasks\.toml"):
        train_in_space(backbone, bars, other, "o/x", OPTIONS)
    site = backbone.sites[0]
    narrow = replace(empty, bases={site: SiteBasis(torch.zeros(32, 0), torch.zeros(64, 0))})
    with pytest.raises(SpaceMismatchError, match=r"expects a weight of \(32, 64\), backbone digits-vit has \(64, 64\)"):
        train_in_space(backbone, bars, narrow, "o/x", OPTIONS)


def test_adapter_or_head_that_does_not_fit_is_refused(
    backbone: Backbone, bars: PreparedTask, first: TrainResult, empty: Space
) -> None:
    adapter = update_adapter(first.update, empty.bases)
    with pytest.raises(SpaceMismatchError, match="'nowhere'"):
        evaluate(backbone, bars, {"nowhere": next(iter(adapter.values()))}, first.head)
    with pytest.raises(ConfigError, match=r"head: expected .* for 4 classes"):
        evaluate(backbone, bars, None, {"weight": torch.zeros(3, 64), "bias": torch.zeros(3)})


def test_lora_baseline_has_its_rank_and_learns(backbone: Backbone, bars: PreparedTask) -> None:
    result = train_lora(backbone, bars, 8, OPTIONS)
    assert {factors.rank for factors in result.adapter.values()} == {8}
    assert result.trained_numbers == 8 * (64 + 64) * len(backbone.sites)
    frozen = train_lora(backbone, bars, 0, OPTIONS)
    assert frozen.adapter == {}
    adapted = evaluate(backbone, bars, result.adapter, result.head).value
    assert adapted > 0.5
    assert adapted > evaluate(backbone, bars, None, frozen.head).value


def test_the_update_says_what_was_trained(backbone: Backbone, bars: PreparedTask, grown: Space) -> None:
    """The dW of the update is that of the trained parameters, core and free directions, at every site."""
    trained: dict[str, SpaceFactors] = {}

    def watched(*arguments: Any) -> Any:
        trained.update(arguments[3])
        return train(*arguments)

    with mock.patch.object(in_space, "train", watched):
        result = train_in_space(backbone, bars, grown, "o/new", replace(OPTIONS, epochs=1))
    adapter = update_adapter(result.update, grown.bases)
    assert trained.keys() == adapter.keys()
    for site, change in trained.items():
        out, in_ = (factor.detach().double() for factor in change.factors())
        got = adapter[site].out @ adapter[site].in_.T
        torch.testing.assert_close(got, out @ in_.T, rtol=1e-4, atol=1e-5)
        assert float(got.norm()) > 1e-3, "nothing was trained, so the comparison shows nothing"


# --- planted bugs ------------------------------------------------------------------------------------------------

Check = Callable[[Backbone, PreparedTask, Space], None]


def _thawed(base: Place, change: Any) -> torch.nn.Module:
    base.module.requires_grad_(True)
    return adapted(base, change)


def _without_core(change: SpaceFactors) -> tuple[Tensor, Tensor]:
    return change.free_out, change.free_in


def _swapped_residual(out: Tensor, in_: Tensor) -> Any:
    return canonical_factors(in_, out)


def _swapped_core(out: Tensor, in_: Tensor, rank: int) -> Any:
    return compress_core(in_, out, rank)


@contextmanager
def _left_in_place(backbone: Backbone, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    for site, module in modules.items():
        inject._place(backbone.module, site, module)
    yield


@contextmanager
def _removed_unless_interrupted(backbone: Backbone, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    originals = {site: backbone.site(site).module for site in modules}
    for site, module in modules.items():
        inject._place(backbone.module, site, module)
    yield
    for site, original in originals.items():
        inject._place(backbone.module, site, original)


def _gradients(backbone: Backbone, bars: PreparedTask, grown: Space) -> None:
    test_gradient_reaches_every_part()


LOOP = "share_client.training.loop"


@pytest.mark.parametrize(
    ("check", "where", "bug"),
    [
        (test_training_leaves_the_backbone_bit_equal, f"{LOOP}.adapted", _thawed),
        (test_training_leaves_the_backbone_bit_equal, f"{LOOP}.injected", _left_in_place),
        (
            test_training_that_is_interrupted_leaves_the_backbone_bit_equal,
            f"{LOOP}.injected",
            _removed_unless_interrupted,
        ),
        (_gradients, "share_client.training.factors.SpaceFactors.factors", _without_core),
        (test_the_update_says_what_was_trained, "share_client.training.in_space.canonical_factors", _swapped_residual),
        (test_the_update_says_what_was_trained, "share_client.training.in_space.compress_core", _swapped_core),
    ],
    ids=[
        "base-not-frozen",
        "injection-not-removed",
        "injection-not-removed-after-interrupt",
        "core-ignored",
        "residual-swapped",
        "core-swapped",
    ],
)
def test_planted_bug_is_caught(check: Check, where: str, bug: Any, bars: PreparedTask, grown: Space) -> None:
    own = load_backbone("digits-vit", "cpu")  # the bug may spoil it
    check(own, bars, grown)
    with mock.patch(where, bug), pytest.raises((AssertionError, TypeError, ConfigError)):
        check(own, bars, grown)
