"""Position and orientation from an image: of an object of some category in front of the camera, or of the camera.

A rotation is predicted in the continuous representation of Zhou et al. (arXiv 1812.07035): six numbers are two
vectors, and Gram-Schmidt makes a rotation of them. Unlike angles and quaternions it has no jump that a network would
have to learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from share_client import values
from share_client.backbones import Backbone
from share_client.data import Field, Table
from share_client.kinds.image_tables import PixelRows, image_backbone, numbers, read_image_tables
from share_client.kinds.kind import Kind, PreparedTask
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError

FIELDS = (Field("rotation", (list,)), Field("translation", (list,), required=False))
"""A rotation matrix as three rows of three numbers, and three numbers in any unit."""
OPTIONS = {"within": values.number(0, 180, above=True), "unit": values.number(0, 1e9, above=True)}


@dataclass(frozen=True)
class Pose(Kind):
    """A rotation, and a translation where the rows have one."""

    within: float = 30.0
    """Largest error in degrees of a rotation that counts as right."""
    unit: float = 1.0
    """Translations are divided by this; it should be about their spread, so that both parts of the loss weigh alike."""

    name = "pose"
    metric = "accuracy"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read both tables.

        Raises:
            ConfigError: unreadable data, a matrix that is no rotation, or a backbone that takes no images.
        """
        shape = image_backbone(config, backbone, self.name).image_shape
        train, test, options = read_image_tables(config, FIELDS, shape, OPTIONS)
        kind = Pose(**options)
        train_y, test_y = _poses(train.table, kind.unit), _poses(test.table, kind.unit)
        names = ("rotation", "translation")[: 1 + (train_y.shape[1] > 9)]
        return PreparedTask(config, kind, PixelRows(train.pixels, train_y), PixelRows(test.pixels, test_y), names)

    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a linear map from features to six numbers for the rotation and three for the translation."""
        return nn.Linear(width, 6 + 3 * (len(task.classes) - 1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over rows of ``||R - R*||_F^2 / 2 = 2 (1 - cos angle)`` plus the squared distance."""
        apart = rotation_of(outputs[:, :6]) - targets[:, :9].view(-1, 3, 3)
        return ((apart**2).sum(dim=(1, 2)) / 2 + ((outputs[:, 6:] - targets[:, 9:]) ** 2).sum(dim=1)).mean()

    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return of each row the error of the rotation in degrees and that of the translation in units, (rows, 2)."""
        angle = geodesic(rotation_of(outputs[:, :6]), targets[:, :9].view(-1, 3, 3))
        return torch.stack([angle, (outputs[:, 6:] - targets[:, 9:]).norm(dim=1)], dim=1)

    def score(self, judged: Tensor) -> float:
        """Return the fraction of rows whose rotation is right within :attr:`within` degrees."""
        return float((judged[:, 0] <= self.within).double().mean())

    def details(self, judged: Tensor) -> Mapping[str, float]:
        """Return the median errors: of the rotation in degrees, of the translation in units."""
        angle, apart = judged.double().quantile(0.5, dim=0).tolist()
        return {"median_degrees": angle, "median_translation": apart}


def rotation_of(six: Tensor) -> Tensor:
    """Return rotations (rows, 3, 3) of six numbers each, by Gram-Schmidt (arXiv 1812.07035, equation 15).

    Their first three numbers give the direction of the first column; the next three, less their part along it, that of
    the second; the third is the cross product.
    """
    first = nn.functional.normalize(six[:, :3], dim=1, eps=1e-6)
    second = six[:, 3:] - (first * six[:, 3:]).sum(dim=1, keepdim=True) * first
    second = nn.functional.normalize(second, dim=1, eps=1e-6)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=2)


def geodesic(one: Tensor, other: Tensor) -> Tensor:
    """Return the angle (rows,) in degrees of the rotation between two, from 0 to 180.

    It is ``2 asin(||R - R*||_F / sqrt(8))``, which is exact for small angles, where the arc cosine of the trace is not.
    """
    chord = (one - other).norm(dim=(1, 2)) / 8**0.5
    return torch.rad2deg(2 * torch.asin(chord.clamp(max=1)))


def _poses(table: Table, unit: float) -> Tensor:
    """Return (rows, 9) or (rows, 12): the matrix, row by row, and the translation in units."""
    matrices = numbers(table, "rotation", (3, 3), "three rows of three numbers")
    wrong = (matrices @ matrices.transpose(1, 2) - torch.eye(3)).abs().amax(dim=(1, 2)) > 1e-3
    wrong |= torch.linalg.det(matrices) < 0
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ConfigError(
            f"{table.where(row)}: rotation: expected a rotation matrix, got one whose rows are not orthonormal, or a "
            "reflection; a quaternion or angles must be made a matrix first"
        )
    if "translation" not in table.columns:
        return matrices.flatten(1)
    return torch.cat([matrices.flatten(1), numbers(table, "translation", (3,), "three numbers") / unit], dim=1)
