"""Keypoints: reading, the loss over visible points, PCK."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from share_client.backbones import Backbone
from share_client.kinds.keypoints import Keypoints
from share_client.tasks_file import TaskConfig
from share_client.training import prepare_task
from share_core.errors import ConfigError


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.floats(0.01, 1), st.sampled_from([(1.0, 1.0), (1.0, 0.5), (0.25, 1.0)]))
def test_loss_and_pck_are_those_of_the_definition(seed: int, alpha: float, sides: tuple[float, float]) -> None:
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.rand(5, 8, generator=draw)
    targets = torch.rand(5, 4, 3, generator=draw)
    targets[..., 2] = (targets[..., 2] > 0.4).float()
    right, seen, losses = 0, 0, []
    for row in range(5):
        squares = []
        for point in range(4):
            if targets[row, point, 2]:
                dx, dy = (outputs[row, 2 * point : 2 * point + 2] - targets[row, point, :2]).tolist()
                squares.append(dx * dx + dy * dy)
                seen += 1
                right += ((dx * sides[0]) ** 2 + (dy * sides[1]) ** 2) ** 0.5 <= alpha
        losses.append(sum(squares) / max(1, len(squares)))
    kind = Keypoints(alpha, sides)
    assert float(kind.loss(outputs, targets)) == pytest.approx(sum(losses) / 5, rel=1e-4)
    judged = torch.cat([kind.judge(outputs[:2], targets[:2]), kind.judge(outputs[2:], targets[2:])])
    assert kind.score(judged) == pytest.approx(right / max(1, seen))


def test_rows_are_read(encoder: Backbone, poses: Callable[..., TaskConfig]) -> None:
    task = prepare_task(poses("keypoints", "pyramid", options={"alpha": 0.2}), encoder)
    assert len(task.classes) == 5
    inputs, targets = task.train.batch([0, 2], torch.device("cpu"))
    assert (inputs["pixels"].shape, targets.shape) == ((2, 3, 24, 24), (2, 5, 3))
    assert targets[..., 2].eq(1).all()
    assert task.kind.head(task, 96)(torch.zeros(2, 96)).shape == (2, 10)
    assert task.kind.alpha == 0.2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keypoints", "words"),
    [
        ([[0.5, 0.5]] * 4, r"line 3: keypoints: .* of shape \[5, 2\] as in the first row, got shape \[4, 2\]"),
        ([[12, 0.5]] * 5, "line 3: keypoints: expected x and y of visible points from 0 to 1"),
        ([[0.5, 1e999]] * 5, "line 3: keypoints: expected finite numbers"),
        ([[10**400, 0.5]] * 5, r"line 3: keypoints: expected a list of \[x, y\]"),
        ([0.5] * 10, r"line 3: keypoints: expected a list of \[x, y\]"),
    ],
)
def test_what_is_no_list_of_points_names_its_row(
    encoder: Backbone, poses: Callable[..., TaskConfig], keypoints: Any, words: str
) -> None:
    config = poses("keypoints", "pyramid")
    lines = config.train.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "keypoints": keypoints})
    config.train.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=words):
        prepare_task(config, encoder)


def test_hidden_points_count_for_nothing(encoder: Backbone, poses: Callable[..., TaskConfig]) -> None:
    config = poses("keypoints", "pyramid")
    for path in (config.train, config.test):
        assert path is not None
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["keypoints"] = [[x, y, 1] for x, y in row["keypoints"][:-1]] + [[-7.0, 9.0, 0]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = prepare_task(config, encoder)
    _, targets = task.train.batch([0], torch.device("cpu"))
    exact = targets[:, :, :2].clone()
    exact[:, -1] = 0.5
    assert float(task.kind.loss(exact.flatten(1), targets)) == 0
    assert task.kind.judge(exact.flatten(1), targets).tolist() == [[4.0, 4.0]]
