"""What Adam knows, carried from wide factors to narrow ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_client.training import Backbone, PreparedTask, TrainingOptions, moments, train_in_space
from share_client.training.factors import SpaceFactors
from share_client.training.loop import Trained, train
from share_client.training.moments import Moments, carried
from share_core.fingerprint import describe_space
from share_core.space import empty_space
from share_core.types import Core, SiteBasis

D_OUT, D_IN, K, WIDE = 7, 9, 3, 4
BETAS = (0.9, 0.999)


def change_of(draw: torch.Generator, free_in: Tensor, core_in: Tensor) -> SpaceFactors:
    """Return a change with given ``in_`` sides and random ``out`` sides."""
    left, right = (torch.linalg.qr(torch.randn(d, K, generator=draw)).Q for d in (D_OUT, D_IN))
    core = Core(torch.randn(K, core_in.shape[1], generator=draw), core_in)
    change = SpaceFactors(SiteBasis(left, right), core, free_in)
    with torch.no_grad():
        change.free_out.copy_(torch.randn(D_OUT, free_in.shape[1], generator=draw))
    return change


def adam(gradients: list[Tensor]) -> dict[str, Tensor]:
    """Return Adam's state after these gradients, by the plain recursion."""
    mean, square = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for one in gradients:
        mean = BETAS[0] * mean + (1 - BETAS[0]) * one
        square = BETAS[1] * square + (1 - BETAS[1]) * one.square()
    return {"step": torch.tensor(float(len(gradients))), "exp_avg": mean, "exp_avg_sq": square}


def check_combined_columns(seed: int) -> None:
    """New columns that the old ones span: the means are those of a training with the new ones from the start."""
    draw = torch.Generator().manual_seed(seed)
    wide = change_of(draw, torch.randn(D_IN, WIDE, generator=draw), torch.randn(K, 2, generator=draw))
    kept = change_of(
        draw,
        wide.free_in.detach() @ torch.randn(WIDE, 2, generator=draw),
        wide.core_in.detach() @ torch.randn(2, 2, generator=draw),
    )
    weights = [torch.randn(D_OUT, D_IN, generator=draw) for _ in range(5)]
    inside = [torch.randn(K, K, generator=draw) for _ in range(5)]
    known: dict[Tensor, Any] = {
        wide.free_out: adam([g @ wide.free_in.detach() for g in weights]),
        wide.core_out: adam([g @ wide.core_in.detach() for g in inside]),
    }
    found = carried({"a": wide}, {"a": kept}, known)
    for parameter, gradients in (
        (kept.free_out, [g @ kept.free_in.detach() for g in weights]),
        (kept.core_out, [g @ kept.core_in.detach() for g in inside]),
    ):
        torch.testing.assert_close(found[parameter]["exp_avg"], adam(gradients)["exp_avg"], rtol=1e-3, atol=1e-4)
        assert int(found[parameter]["step"]) == 5


def check_scaled_columns(seed: int) -> None:
    """New columns that are multiples of old ones: the means of the squares are exact as well, on both sides."""
    draw = torch.Generator().manual_seed(seed)
    wide = change_of(draw, torch.randn(D_IN, WIDE, generator=draw), torch.randn(K, 2, generator=draw))
    order, scale = torch.randperm(WIDE, generator=draw)[:2], torch.tensor([0.5, -3.0])
    kept = change_of(draw, wide.free_in.detach()[:, order] * scale, wide.core_in.detach())
    with torch.no_grad():
        kept.free_out.copy_(wide.free_out[:, order] * scale)
    weights = [torch.randn(D_OUT, D_IN, generator=draw) for _ in range(5)]
    known: dict[Tensor, Any] = {
        wide.free_out: adam([g @ wide.free_in.detach() for g in weights]),
        wide.free_in: adam([g.T @ wide.free_out.detach() for g in weights]),
    }
    found = carried({"a": wide}, {"a": kept}, known)
    for parameter, gradients in (
        (kept.free_out, [g @ kept.free_in.detach() for g in weights]),
        (kept.free_in, [g.T @ kept.free_out.detach() for g in weights]),
    ):
        for name, expected in adam(gradients).items():
            torch.testing.assert_close(found[parameter][name], expected, rtol=1e-3, atol=1e-5)
    assert kept.core_out not in found, "nothing is known of it"


def check_unseen_columns(seed: int) -> None:
    """A new column that is orthogonal to the old ones counts as an average one of its length, and never as still."""
    draw = torch.Generator().manual_seed(seed)
    columns = torch.linalg.qr(torch.randn(D_IN, WIDE + 1, generator=draw)).Q
    lengths = torch.rand(WIDE, generator=draw) + 0.5
    wide = change_of(draw, columns[:, :WIDE] * lengths, torch.randn(K, 2, generator=draw))
    kept = change_of(draw, 2 * columns[:, WIDE:], torch.randn(K, 2, generator=draw))
    square = torch.rand(D_OUT, WIDE, generator=draw)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.randn(D_OUT, WIDE, generator=draw), "exp_avg_sq": square}
    found = carried({"a": wide}, {"a": kept}, {wide.free_out: state})[kept.free_out]
    assert float(found["exp_avg"].abs().max()) < 1e-5
    expected = 4 * (square / lengths.square()).mean(1, keepdim=True)
    torch.testing.assert_close(found["exp_avg_sq"], expected, rtol=1e-4, atol=1e-6)


CHECKS = (check_combined_columns, check_scaled_columns, check_unseen_columns)


@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("check", CHECKS)
def test_moments_are_those_of_the_new_columns(check: Callable[[int], None], seed: int) -> None:
    check(seed)


def _edited(change: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    real = moments._mapped
    return lambda state, old, new: change(state, real(state, old, new), old, new)


BUGS: dict[str, tuple[Callable[[int], None], Callable[..., Any]]] = {
    "the mean begins anew": (
        check_combined_columns,
        _edited(lambda state, found, old, new: {**found, "exp_avg": torch.zeros_like(found["exp_avg"])}),
    ),
    "the first columns are taken": (
        check_scaled_columns,
        lambda state, old, new: {
            "step": state["step"],
            **{name: state[name][:, : new.shape[1]] for name in ("exp_avg", "exp_avg_sq")},
        },
    ),
    "what is unseen has no gradient": (
        check_unseen_columns,
        _edited(
            lambda state, found, old, new: {
                **found,
                "exp_avg_sq": state["exp_avg_sq"] @ (torch.linalg.pinv(old) @ new).square(),
            }
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    check, planted = BUGS[bug]
    with mock.patch.object(moments, "_mapped", planted), pytest.raises(AssertionError):
        check(3)


def check_all_goes_on(backbone: Backbone, bars: PreparedTask, trains: Callable[..., Trained] = train) -> None:
    """In a training with a budget no number begins anew after the cut."""
    space = empty_space(describe_space("digits", backbone.site_weights()))
    told: list[tuple[Moments, Moments | None]] = []

    def spied(*arguments: Any) -> Trained:
        trained = trains(*arguments)
        told.append((trained.moments, arguments[7] if len(arguments) > 7 else None))
        return trained

    with mock.patch("share_client.training.in_space.train", spied):
        train_in_space(backbone, bars, space, "org/bars", TrainingOptions(epochs=3, budget=0.2))
    (wide, nothing), (narrow, _) = told
    assert nothing is None
    assert len(narrow.keys() & wide.keys()) == 2, "weight and bias of the head"
    assert len(narrow) > 2
    assert {int(state["step"]) for state in narrow.values()} == {18}


def test_all_goes_on_after_the_cut(backbone: Backbone, bars: PreparedTask) -> None:
    check_all_goes_on(backbone, bars)


def test_a_second_part_that_begins_anew_is_caught(backbone: Backbone, bars: PreparedTask) -> None:
    def forgetful(*arguments: Any) -> Trained:
        return replace(train(*arguments), moments={})

    with pytest.raises(AssertionError):
        check_all_goes_on(backbone, bars, forgetful)
