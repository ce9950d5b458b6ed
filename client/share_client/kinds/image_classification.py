"""Image classification from archives, folders of image files, and tables."""

from __future__ import annotations

from torch import Tensor

from share_client.backbones import Backbone
from share_client.data import Fit, ImageRows, read_image_splits
from share_client.kinds.classification import Classification, classes_of, indices_of
from share_client.kinds.image_tables import PixelRows, image_backbone
from share_client.kinds.kind import PreparedTask
from share_client.tasks_file import TaskConfig


class ImageClassification(Classification):
    """A label for each image."""

    name = "image-classification"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read both splits and check that the images fit the backbone.

        Raises:
            ConfigError: unreadable data, an unknown option, another image size, or a backbone that takes no images.
        """
        shape = image_backbone(config, backbone, self.name).image_shape
        train, test = read_image_splits(config, Fit.of(config, shape))
        classes = classes_of((train.labels, test.labels), config, test.places.__getitem__)
        return PreparedTask(
            config=config,
            kind=self,
            train=PixelRows(_first(train), indices_of(train.labels, classes)),
            test=PixelRows(_first(test), indices_of(test.labels, classes)),
            classes=classes,
        )


def _first(rows: ImageRows) -> Tensor:
    """Return pixels (n, c, h, w)."""
    return rows.x.permute(0, 3, 1, 2).contiguous()
