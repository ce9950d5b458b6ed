"""Every training tells the rows at which step they are read, so that noise can be new at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from share_client.kinds import Rows
from share_client.kinds.kind import Chosen
from share_client.training import Backbone, PreparedTask, TrainingOptions, train_in_space
from share_client.training.loop import fresh_head, train
from share_core.fingerprint import describe_space
from share_core.privacy import SampleNoise
from share_core.space import empty_space

Seen = list[tuple[int, int]]


class Dated(Chosen):
    """All rows, which write down at which step how many of them are read."""

    def __init__(self, rows: Rows, seen: Seen, step: int = 0) -> None:
        super().__init__(rows, range(len(rows)))
        self._seen, self._step = seen, step

    def at(self, step: int) -> Rows:
        return Dated(self._rows, self._seen, step)

    def batch(self, rows: Sequence[int], device: torch.device) -> Any:
        self._seen.append((self._step, len(rows)))
        return super().batch(rows, device)


def dated(task: PreparedTask) -> tuple[PreparedTask, Seen]:
    seen: Seen = []
    return replace(task, train=Dated(task.train, seen)), seen


@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_parts_of_a_step_are_of_that_step(backbone: Backbone, bars: PreparedTask, accumulate: int) -> None:
    task, seen = dated(bars)
    head = fresh_head(backbone, task, 0, None)
    options = TrainingOptions(epochs=2, batch_size=60, accumulate=accumulate)
    steps = 2 * -(-task.train_rows // 60)
    for span in ((0.0, 0.5), (0.5, 1.0)):
        train(backbone, task, head, {}, options, None, span)
    assert [step for step, _ in seen] == [step for step in range(1, steps + 1) for _ in range(accumulate)]


def test_held_out_rows_are_always_measured_alike(backbone: Backbone, bars: PreparedTask) -> None:
    """The rows that watch a training are of no step, whereas those that are trained on are, though some are missing."""
    task, seen = dated(bars)
    options = TrainingOptions(epochs=2, batch_size=1000, patience=9)
    train(backbone, task, fresh_head(backbone, task, 0, None), {}, options, None)
    trained = [(step, count) for step, count in seen if step]
    out = task.train_rows - trained[0][1]
    assert [step for step, _ in trained] == [1, 2]
    assert sum(count for step, count in seen if not step) == 2 * out > 0


def test_steps_of_dp_sgd_are_told(backbone: Backbone, bars: PreparedTask) -> None:
    pytest.importorskip("opacus", reason="DP-SGD needs the extra privacy")
    task, seen = dated(bars)
    noise = SampleNoise(1.0, 1e-4, noise_multiplier=1.0, max_grad_norm=1.0, steps=3, sample_rate=0.5)
    space = empty_space(describe_space("digits-vit", backbone.site_weights()))
    train_in_space(backbone, task, space, "o/new", TrainingOptions(epochs=2, accumulate=2), declared=noise)
    assert [step for step, _ in seen] == [1, 1, 2, 2, 3, 3]
