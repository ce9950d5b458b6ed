"""Image classification from archives, folders of image files, and tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from share_client.backbones import Backbone, Batch, ImageBackbone
from share_client.data import Fit, ImageRows, read_image_splits
from share_client.kinds.classification import Classification, classes_of, indices_of
from share_client.kinds.kind import PreparedTask, Rows
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError


class _Images(Rows):
    """Images in memory, channels first."""

    def __init__(self, pixels: Tensor, targets: Tensor) -> None:
        self._pixels = pixels
        self._targets = targets

    def __len__(self) -> int:
        return len(self._targets)

    def lengths(self) -> Sequence[int]:
        """All images cost the same."""
        return [1] * len(self)

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Batch, Tensor]:
        """Return ``pixels`` (rows, c, h, w) and targets (rows,)."""
        index = torch.tensor(rows)
        return {"pixels": self._pixels[index].to(device)}, self._targets[index].to(device)


class ImageClassification(Classification):
    """A label for each image."""

    name = "image-classification"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read both splits and check that the images fit the backbone.

        Raises:
            ConfigError: unreadable data, an unknown option, another image size, or a backbone that takes no images.
        """
        if not isinstance(backbone, ImageBackbone):
            raise ConfigError(
                f"task {config.name!r}: kind: expected text-classification for backbone {backbone.name}, "
                f"got {self.name}"
            )
        train, test = read_image_splits(config, Fit.of(config, backbone.image_shape))
        classes = classes_of((train.labels, test.labels), config, test.places.__getitem__)
        return PreparedTask(
            config=config,
            kind=self,
            train=_Images(_first(train), indices_of(train.labels, classes)),
            test=_Images(_first(test), indices_of(test.labels, classes)),
            classes=classes,
        )


def _first(rows: ImageRows) -> Tensor:
    """Return pixels (n, c, h, w)."""
    return rows.x.permute(0, 3, 1, 2).contiguous()
