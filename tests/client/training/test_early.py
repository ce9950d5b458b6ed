"""Passes, parts of a training, and training that ends early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from share_client.training import (
    Backbone,
    PreparedTask,
    Progress,
    TrainingOptions,
    early,
    in_space,
    loop,
    train_in_space,
)
from share_client.training.early import held_out
from share_client.training.loop import adamw, fresh_head, train
from share_client.training.moments import Moments
from share_client.training.options import DEFAULT_EPOCHS, DEFAULT_RATE, LEAST_STEPS, SHORT_STEPS, schedule_of
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.space import empty_space


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100, 426, 427, 5000])
def test_few_rows_are_passed_over_more_often(rows: int) -> None:
    per_pass = -(-rows // 32)
    found, rate = schedule_of(TrainingOptions(), rows)
    assert found >= DEFAULT_EPOCHS
    assert found * per_pass >= LEAST_STEPS
    assert found == DEFAULT_EPOCHS or (found - 1) * per_pass < LEAST_STEPS, "no more than that"
    assert rate == (DEFAULT_RATE if found * per_pass >= SHORT_STEPS else 2 * DEFAULT_RATE)
    assert schedule_of(TrainingOptions(epochs=7, learning_rate=1e-4), rows) == (7, 1e-4)


def test_two_halves_take_the_steps_of_the_whole(backbone: Backbone, bars: PreparedTask) -> None:
    options = TrainingOptions(epochs=3)

    def seen(*spans: tuple[float, float]) -> list[tuple[int, int]]:
        head = fresh_head(backbone, bars, 0, None)
        told: list[Progress] = []
        steps = [train(backbone, bars, head, {}, options, told.append, span).steps for span in spans]
        assert sum(steps) == len(told) == 18
        return [(one.epoch, one.step) for one in told]

    assert seen((0.0, 2 / 3), (2 / 3, 1.0)) == seen((0.0, 1.0)) == [(1 + n // 6, n + 1) for n in range(18)]


def check_parts_are_the_whole(backbone: Backbone, bars: PreparedTask) -> None:
    """Same rows, same rates, and the second part knows what Adam knew: the two ways end at the same numbers."""
    found = []
    for spans in ([(0.0, 1.0)], [(0.0, 2 / 3), (2 / 3, 1.0)]):
        head, moments = fresh_head(backbone, bars, 0, None), None
        for span in spans:
            moments = train(backbone, bars, head, {}, TrainingOptions(epochs=3), None, span, moments).moments
        found.append(torch.cat([p.detach().flatten() for p in head.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-7)


def test_the_parts_are_the_whole(backbone: Backbone, bars: PreparedTask) -> None:
    check_parts_are_the_whole(backbone, bars)


def test_a_second_part_that_begins_anew_is_caught(backbone: Backbone, bars: PreparedTask) -> None:
    def forgetful(head: nn.Module, width: int, rated: Any, rate: float, moments: Moments | None) -> Any:
        return adamw(head, width, rated, rate)

    with mock.patch.object(loop, "adamw", forgetful), pytest.raises(AssertionError):
        check_parts_are_the_whole(backbone, bars)


def test_held_out_rows_are_not_trained_on(bars: PreparedTask) -> None:
    task, rows = held_out(bars, 3)
    assert (task.train_rows, len(rows)) == (173, 19)
    whole = bars.train.batch(range(bars.train_rows), torch.device("cpu"))[0]
    parts = [part.batch(range(len(part)), torch.device("cpu"))[0] for part in (task.train, rows)]
    (name,) = whole
    together = {tuple(row.tolist()) for part in parts for row in part[name].flatten(1)}
    assert together == {tuple(row.tolist()) for row in whole[name].flatten(1)}
    assert len(together) == 192


def test_one_row_cannot_be_held_out(bars: PreparedTask) -> None:
    from share_client.kinds.kind import Chosen

    with pytest.raises(ConfigError, match="patience needs at least 2 training rows"):
        held_out(replace(bars, train=Chosen(bars.train, [0])), 0)


WHOLE, END = (0.0, 1.0), (0.6, 1.0)


def check_the_best_is_kept(
    measured: list[float], best: int, steps: int, span: tuple[float, float], backbone: Backbone, bars: PreparedTask
) -> None:
    """Losses on the held-out rows are given, one for each time they are measured; ``best`` is the one that is kept."""
    losses = iter(measured)
    after: list[torch.Tensor] = []
    head = fresh_head(backbone, bars, 0, None)

    def loss(self: Any) -> float:
        after.append(next(head.parameters()).detach().clone())
        return next(losses)

    with mock.patch.object(early.EarlyStop, "_loss", loss):
        epochs = 5 if len(measured) == 4 else len(measured)
        trained = train(backbone, bars, head, {}, TrainingOptions(epochs=epochs, patience=2), None, span)
    assert len(after) == len(measured)
    assert trained.steps == steps
    assert torch.equal(next(head.parameters()), after[best])
    assert not any(torch.equal(after[best], other) for i, other in enumerate(after) if i != best)


CASES = {
    "two passes before the end": ([3.0, 1.0, 2.0, 1.5], 1, 24, WHOLE),
    "the last pass": ([3.0, 2.0, 1.0], 2, 18, WHOLE),
    "not the last pass": ([3.0, 1.0, 2.0], 1, 18, WHOLE),
    "the only pass": ([3.0], 0, 6, WHOLE),
    "what a second part starts from": ([1.0, 2.0], 0, 5, END),
    "a second part": ([2.0, 1.0], 1, 5, END),
}


@pytest.mark.parametrize("case", CASES)
def test_the_best_is_kept(case: str, backbone: Backbone, bars: PreparedTask) -> None:
    check_the_best_is_kept(*CASES[case], backbone, bars)


real_ended = early.EarlyStop.ended


def _two_at_most() -> Callable[[Any], bool]:
    calls: list[int] = []

    def ended(self: Any) -> bool:
        calls.append(0)
        return len(calls) <= 2 and real_ended(self)

    return ended


def _not_the_first() -> Callable[[Any], bool]:
    calls: list[int] = []

    def ended(self: Any) -> bool:
        calls.append(0)
        return len(calls) > 1 and real_ended(self)

    return ended


@pytest.mark.parametrize(
    ("case", "name", "bug"),
    [
        ("two passes before the end", "restore", lambda: lambda self: None),
        ("two passes before the end", "ended", lambda: lambda self: bool(self._loss() < 0)),
        ("the last pass", "ended", _two_at_most),
        ("the only pass", "ended", _not_the_first),
        ("what a second part starts from", "ended", _not_the_first),
    ],
)
def test_planted_bug_is_caught(
    case: str, name: str, bug: Callable[[], Callable[..., Any]], backbone: Backbone, bars: PreparedTask
) -> None:
    with mock.patch.object(early.EarlyStop, name, bug()), pytest.raises((AssertionError, StopIteration)):
        check_the_best_is_kept(*CASES[case], backbone, bars)


def test_a_budget_cuts_by_the_steps_that_are_taken(
    backbone: Backbone, bars: PreparedTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def cut(steps: int) -> float:
        counted.append(steps)
        return 0.5

    monkeypatch.setattr(in_space, "narrow_at", cut)
    left = held_out(bars, 0)[0].train_rows
    options = TrainingOptions(epochs=2, batch_size=left, budget=0.5)
    space = empty_space(describe_space("digits", backbone.site_weights()))
    for patience in (None, 9):
        train_in_space(backbone, bars, space, "org/bars", replace(options, patience=patience))
    assert counted == [4, 2], "without the held-out rows a pass is one step less"
