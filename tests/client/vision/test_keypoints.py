"""Keypoints: reading, the loss over visible points, PCK."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from share_client.backbones import Backbone, load_backbone
from share_client.kinds.keypoints import Keypoints
from share_client.tasks_file import TaskConfig
from share_client.training import prepare_task
from share_core.errors import ConfigError

SIDES = st.sampled_from([(1.0, 1.0), (1.0, 0.5), (0.25, 1.0)])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.floats(0.01, 1), st.lists(SIDES, min_size=5, max_size=5))
def test_loss_and_pck_are_those_of_the_definition(seed: int, alpha: float, sides: list[tuple[float, float]]) -> None:
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.rand(5, 8, generator=draw)
    targets = torch.rand(5, 4, 3, generator=draw)
    targets[..., 2] = (targets[..., 2] > 0.4).float()
    targets = torch.cat([targets, torch.tensor(sides).unsqueeze(1).expand(-1, 4, -1)], dim=2)
    right, seen, losses = 0, 0, []
    for row in range(5):
        squares = []
        for point in range(4):
            if targets[row, point, 2]:
                dx, dy = (outputs[row, 2 * point : 2 * point + 2] - targets[row, point, :2]).tolist()
                squares.append(dx * dx + dy * dy)
                seen += 1
                right += ((dx * sides[row][0]) ** 2 + (dy * sides[row][1]) ** 2) ** 0.5 <= alpha
        losses.append(sum(squares) / max(1, len(squares)))
    kind = Keypoints(alpha)
    assert float(kind.loss(outputs, targets)) == pytest.approx(sum(losses) / 5, rel=1e-4)
    judged = torch.cat([kind.judge(outputs[:2], targets[:2]), kind.judge(outputs[2:], targets[2:])])
    assert kind.score(judged) == pytest.approx(right / max(1, seen))


def test_rows_are_read(encoder: Backbone, poses: Callable[..., TaskConfig]) -> None:
    task = prepare_task(poses("keypoints", "pyramid", options={"alpha": 0.2}), encoder)
    assert len(task.classes) == 5
    inputs, targets = task.train.batch([0, 2], torch.device("cpu"))
    assert (inputs["pixels"].shape, targets.shape) == ((2, 3, 24, 24), (2, 5, 5))
    assert targets[..., 2:].eq(1).all()
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


@pytest.mark.parametrize(
    ("size", "apart", "right"), [((400, 100), 39, 1), ((400, 100), 41, 0), ((50, 100), 9, 1), ((50, 100), 11, 0)]
)
@pytest.mark.parametrize("down", [False, True])
def test_points_are_judged_in_the_image_of_the_file(
    tmp_path: Path, size: tuple[int, int], apart: int, right: int, down: bool
) -> None:
    """A tenth of the larger side, in pixels of the file, however the backbone wants the image."""
    image = pytest.importorskip("PIL.Image", reason="images are written by pillow")
    for name, shape in (("a", size), ("b", (30, 30))):
        image.new("L", shape).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "keypoints": [[0.25, 0.25]]} for name in ("b", "a")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "rows.jsonl"
    config = TaskConfig("t", "keypoints", table, table, options={"resize": True})
    task = prepare_task(config, load_backbone("digits-vit", "cpu"))
    _, targets = task.test.batch([1], torch.device("cpu"))
    moved = torch.tensor([[0.25, 0.25 + apart / size[1]] if down else [0.25 + apart / size[0], 0.25]])
    assert task.kind.score(task.kind.judge(moved, targets)) == right
