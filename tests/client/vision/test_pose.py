"""Rotations in six numbers, angles between them, and reading poses. The last test plants bugs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_client.backbones import Backbone, load_backbone
from share_client.kinds import pose
from share_client.kinds.pose import Pose
from share_client.tasks_file import TaskConfig
from share_client.training import prepare_task
from share_core.errors import ConfigError

seeds = st.integers(0, 2**20)


def turn(axis: Tensor, degrees: float) -> Tensor:
    """Return the matrix of a turn about an axis by Rodrigues' formula, in float64."""
    x, y, z = (axis.double() / axis.double().norm()).tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.eye(3, dtype=torch.float64) + angle.sin() * cross + (1 - angle.cos()) * cross @ cross


def check_rotations(seed: int) -> None:
    six = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).double()
    made = pose.rotation_of(six)
    torch.testing.assert_close(made.transpose(1, 2) @ made, torch.eye(3).double().expand(5, 3, 3))
    torch.testing.assert_close(torch.linalg.det(made), torch.ones(5).double())
    # A rotation whose first two columns are given comes back, and so do multiples of them.
    again = torch.cat([made[:, :, 0] * 3, made[:, :, 1] * 0.2 + made[:, :, 0]], dim=1)
    torch.testing.assert_close(pose.rotation_of(again), made)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_six_numbers_give_a_rotation(seed: int) -> None:
    check_rotations(seed)


def check_angles(seed: int, degrees: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    start = turn(torch.randn(3, generator=draw), float(torch.rand(1, generator=draw)) * 180)
    other = turn(torch.randn(3, generator=draw), degrees) @ start
    got = pose.geodesic(start.unsqueeze(0), other.unsqueeze(0))
    assert float(got) == pytest.approx(degrees, abs=1e-5 if degrees < 179 else 1e-2)
    traced = torch.rad2deg(torch.arccos(((torch.trace(start.T @ other) - 1) / 2).clamp(-1, 1)))
    assert float(got) == pytest.approx(float(traced), abs=1e-4 if 1 < degrees < 179 else 0.1)


@settings(max_examples=50, deadline=None)
@given(seeds, st.floats(0, 180))
def test_the_angle_is_that_of_the_turn_between(seed: int, degrees: float) -> None:
    check_angles(seed, degrees)


def check_loss(seed: int) -> None:
    """Half the squared Frobenius norm is ``2 (1 - cos angle)``; the rest is the squared distance."""
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(4, 9, generator=draw)
    made = pose.rotation_of(torch.randn(4, 6, generator=draw))
    targets = torch.cat([made.flatten(1), torch.randn(4, 3, generator=draw)], dim=1)
    judged = Pose().judge(outputs, targets)
    wanted = 2 * (1 - torch.deg2rad(judged[:, 0]).cos()) + judged[:, 1] ** 2
    torch.testing.assert_close(Pose().loss(outputs, targets), wanted.mean(), rtol=1e-4, atol=1e-4)
    exact = torch.cat([made[:, :, 0], made[:, :, 1], targets[:, 9:]], dim=1)
    assert float(Pose().loss(exact, targets)) == pytest.approx(0, abs=1e-5)
    assert Pose().score(Pose().judge(exact, targets)) == 1


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_the_loss_grows_with_the_angle(seed: int) -> None:
    check_loss(seed)


def test_the_metric_counts_rotations_and_the_details_are_medians() -> None:
    judged = torch.tensor([[10.0, 1.0], [29.0, 2.0], [31.0, 9.0]])
    assert Pose().score(judged) == pytest.approx(2 / 3)
    assert Pose(within=10.0).score(judged) == pytest.approx(1 / 3)
    assert Pose().details(judged) == {"median_degrees": 29.0, "median_translation": 2.0}
    even = torch.cat([judged, torch.tensor([[33.0, 5.0]])])
    assert Pose().details(even) == {"median_degrees": 30.0, "median_translation": 3.5}, "halfway between two"


def test_rows_are_read(encoder: Backbone, poses: Callable[..., TaskConfig]) -> None:
    config = poses("pose", "wedge", options={"unit": 0.5, "within": 15.0})
    task = prepare_task(config, encoder)
    lines = [json.loads(line) for line in config.train.read_text().splitlines()]
    inputs, targets = task.train.batch([3], torch.device("cpu"))
    assert inputs["pixels"].shape == (1, 3, 24, 24)
    torch.testing.assert_close(targets[0, :9].view(3, 3), torch.tensor(lines[3]["rotation"]))
    torch.testing.assert_close(targets[0, 9:], torch.tensor(lines[3]["translation"]) / 0.5)
    assert (task.kind.within, task.classes) == (15.0, ("rotation", "translation"))  # type: ignore[attr-defined]
    assert task.kind.head(task, 96)(torch.zeros(2, 96)).shape == (2, 9)
    for path in (config.train, config.test):
        assert path is not None
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "translation": None}) + "\n" for row in rows))
    alone = prepare_task(config, encoder)
    assert alone.kind.head(alone, 96)(torch.zeros(2, 96)).shape == (2, 6)


@pytest.mark.parametrize(
    ("rotation", "words"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, -1]], "line 2: rotation: expected a rotation matrix.*reflection"),
        ([[2, 0, 0], [0, 2, 0], [0, 0, 2]], "line 2: rotation: expected a rotation matrix"),
        ([1, 0, 0, 0], r"line 2: rotation: expected three rows of three numbers.*got shape \[4\]"),
        ([["x", 0, 0], [0, 1, 0], [0, 0, 1]], "line 2: rotation: expected three rows of three numbers, got another"),
    ],
)
def test_what_is_no_rotation_names_its_row(
    encoder: Backbone, poses: Callable[..., TaskConfig], rotation: Any, words: str
) -> None:
    config = poses("pose", "wedge")
    lines = config.train.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "rotation": rotation})
    config.train.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=words):
        prepare_task(config, encoder)


def test_what_does_not_fit_is_refused(encoder: Backbone, poses: Callable[..., TaskConfig]) -> None:
    config = poses("pose", "wedge")
    with pytest.raises(ConfigError, match=r"options of kind 'pose'.*unknown key 'unt'.*did you mean 'unit'"):
        prepare_task(replace(config, options={"unt": 1.0}), encoder)
    digits = load_backbone("digits-vit", "cpu")
    with pytest.raises(ConfigError, match=r"expected images of .*8 x 8|channel"):
        prepare_task(config, digits)


def _transposed(six: Tensor) -> Tensor:
    return _rotation_of(six).transpose(1, 2)


def _not_orthogonal(six: Tensor) -> Tensor:
    first, second = (torch.nn.functional.normalize(six[:, part], dim=1) for part in (slice(0, 3), slice(3, 6)))
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=2)


def _half(one: Tensor, other: Tensor) -> Tensor:
    return torch.rad2deg(torch.asin(((one - other).norm(dim=(1, 2)) / 8**0.5).clamp(max=1)))


_rotation_of = pose.rotation_of


@pytest.mark.parametrize(
    ("name", "bug", "check"),
    [
        ("rotation_of", _transposed, lambda: check_rotations(1)),
        ("rotation_of", _not_orthogonal, lambda: check_rotations(1)),
        ("geodesic", _half, lambda: check_angles(1, 40.0)),
        ("geodesic", _half, lambda: check_loss(1)),
    ],
)
def test_the_checks_catch_planted_bugs(name: str, bug: Any, check: Callable[[], None]) -> None:
    check()
    with mock.patch.object(pose, name, bug), pytest.raises(AssertionError):
        check()
