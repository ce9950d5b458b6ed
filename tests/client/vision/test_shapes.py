"""Images made for tests and examples: poses fit the pixels, all follows from the seed, pretraining learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from share_simulations import shapes
from share_simulations.shapes import PRETRAINING, SIDE, SOLIDS, captioned, posed, render


def check_pixels(name: str) -> None:
    """What is drawn lies around the projected corners and reaches almost as far as they do."""
    made = posed(name, 8, 5)
    for image, corners in zip(made.images, made.corners, strict=True):
        drawn = (image != image[0, 0]).any(axis=2)
        rows, columns = np.nonzero(drawn)
        assert len(rows) > 20
        low, high = corners.min(axis=0) * SIDE, corners.max(axis=0) * SIDE
        for axis, found in ((0, columns), (1, rows)):
            assert low[axis] - 1 <= found.min() <= low[axis] + 2.5
            assert high[axis] - 3.5 <= found.max() <= high[axis] + 1


@pytest.mark.parametrize("name", sorted(SOLIDS))
def test_what_is_drawn_is_where_the_pose_says(name: str) -> None:
    check_pixels(name)


def check_turns() -> None:
    """A solid that is turned is seen as from a camera that went round it the other way."""
    turn = shapes.rotation(0.7, 0.3, -0.2)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)
    point = np.array([[0.5, -0.2, 0.1]])
    x, y, depth = shapes.project(point, turn, np.zeros(3))[0]
    seen = point[0] @ turn.T
    assert depth == pytest.approx(seen[2] + shapes.DISTANCE)
    assert (x - SIDE / 2) * depth == pytest.approx(seen[0] * shapes.FOCAL * SIDE / 2)
    assert (y - SIDE / 2) * depth == pytest.approx(seen[1] * shapes.FOCAL * SIDE / 2)


def test_projection_is_that_of_a_pinhole() -> None:
    check_turns()


def test_near_faces_hide_far_ones() -> None:
    """Of a box that is looked at from the front only the front face is seen, in its own colour."""
    solid = SOLIDS["box"]
    image = render(solid, np.eye(3), np.zeros(3), np.zeros(3))
    front = solid.colours[4]  # the face at -z
    colour = image[SIDE // 2, SIDE // 2] / 255
    np.testing.assert_allclose(colour / colour.max(), front / front.max(), atol=0.02)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 2


def test_seeds_decide_everything_and_pretraining_is_apart() -> None:
    assert np.array_equal(posed("ell", 3, 1).images, posed("ell", 3, 1).images)
    assert not np.array_equal(posed("ell", 3, 1).images, posed("ell", 3, 2).images)
    (images, words), (night, dark_words) = captioned(("ring",), 4, 1), captioned(("ring",), 4, 1, dark=True)
    assert (images[:, 0, 0] == 255).all()
    assert (night[:, 0, 0] < 100).all()
    assert [f"{text} at night" for text in words] == dark_words
    assert all("ring" in text for text in words)
    assert set(PRETRAINING) == {"box", "slab"}


def test_pretraining_learns() -> None:
    from share_simulations.pretrain_shapes import pretrain_encoder

    made = pretrain_encoder(60, batch_size=32)
    assert made.last_loss < 0.7 * made.first_loss


def _mirrored(points: Any, turn: Any, shift: Any) -> Any:
    flat = _project(points, turn, shift)
    return np.concatenate([SIDE - flat[:, :1], flat[:, 1:]], axis=1)


def _inverse(yaw: float, pitch: float, roll: float) -> Any:
    return -_rotation(yaw, pitch, roll)


_project, _rotation = shapes.project, shapes.rotation


@pytest.mark.parametrize(
    ("name", "bug", "check"),
    [
        ("project", _mirrored, lambda: check_pixels("wedge")),
        ("rotation", _inverse, check_turns),
    ],
)
def test_the_checks_catch_planted_bugs(name: str, bug: Any, check: Callable[[], None]) -> None:
    check()
    with mock.patch.object(shapes, name, bug), pytest.raises(AssertionError):
        check()
