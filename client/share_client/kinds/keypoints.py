"""Named points of an object in an image, such as the joints of a hand. Metric: PCK."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from share_client import values
from share_client.backbones import Backbone
from share_client.data import Field
from share_client.kinds.image_tables import Pictured, PixelRows, image_backbone, numbers, read_image_tables
from share_client.kinds.kind import Kind, PreparedTask
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError

FIELDS = (Field("keypoints", (list,)),)
"""For each point ``[x, y]`` or ``[x, y, visible]``: fractions of the image's width and height, and 1 or 0."""
OPTIONS = {"alpha": values.number(0, 1, above=True)}


@dataclass(frozen=True)
class Keypoints(Kind):
    """The position of each of k points; those that are not visible count neither for the loss nor for the metric."""

    alpha: float = 0.1
    """A point is right within this share of the larger side of its image, as it is in the file."""

    name = "keypoints"
    metric = "pck"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read both tables.

        Raises:
            ConfigError: unreadable data, another number of points in some row, or a backbone that takes no images.
        """
        shape = image_backbone(config, backbone, self.name).image_shape
        train, test, options = read_image_tables(config, FIELDS, shape, OPTIONS)
        train_y, test_y = _points(train), _points(test)
        if train_y.shape[1] != test_y.shape[1]:
            raise ConfigError(
                f"task {config.name!r}: keypoints: expected {train_y.shape[1]} points in the test rows as in the "
                f"training rows, got {test_y.shape[1]}"
            )
        names = tuple(f"point {number}" for number in range(train_y.shape[1]))
        rows = PixelRows(train.pixels, train_y), PixelRows(test.pixels, test_y)
        return PreparedTask(config, Keypoints(**options), *rows, names)

    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a linear map from features to x and y of every point."""
        return nn.Linear(width, 2 * len(task.classes))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over rows of the mean squared distance of their visible points, of (rows, k, 5) targets."""
        seen = targets[..., 2]
        squared = ((outputs.view(len(targets), -1, 2) - targets[..., :2]) ** 2).sum(dim=2)
        return ((squared * seen).sum(dim=1) / seen.sum(dim=1).clamp(min=1)).mean()

    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return of each row how many visible points are right and how many there are, (rows, 2)."""
        apart = (outputs.view(len(targets), -1, 2) - targets[..., :2]) * targets[..., 3:]
        right = apart.norm(dim=2) <= self.alpha
        seen = targets[..., 2]
        return torch.stack([(right * seen).sum(dim=1), seen.sum(dim=1)], dim=1)

    def score(self, judged: Tensor) -> float:
        """Return PCK (Yang and Ramanan, 2013): the fraction of visible points that are right."""
        right, seen = judged.double().sum(dim=0).tolist()
        return float(right / max(1.0, seen))


def _points(rows: Pictured) -> Tensor:
    """Return (rows, k, 5): x, y, visible, and width and height of the image in units of its larger side."""
    table = rows.table
    expected = "a list of [x, y] or [x, y, visible]"
    found = numbers(table, "keypoints", (None, None), expected)
    if found.shape[1] == 0 or found.shape[2] not in (2, 3):
        raise ConfigError(f"{table.where(0)}: keypoints: expected {expected}, got shape {list(found.shape[1:])}")
    if found.shape[2] == 2:
        found = torch.cat([found, torch.ones(*found.shape[:2], 1)], dim=2)
    for row, points in enumerate(found):
        flags, inside = points[:, 2], points[points[:, 2] > 0, :2]
        if not ((flags == 0) | (flags == 1)).all() or not ((inside >= 0) & (inside <= 1)).all():
            raise ConfigError(
                f"{table.where(row)}: keypoints: expected x and y of visible points from 0 to 1, as fractions of the "
                "image's width and height, and visible 0 or 1"
            )
    sides = rows.sizes / rows.sizes.amax(dim=1, keepdim=True)
    return torch.cat([found, sides.unsqueeze(1).expand(-1, found.shape[1], -1)], dim=2)
