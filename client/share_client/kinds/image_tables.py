"""What kinds with images in tables share: rows of pixels beside other columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from share_client import values
from share_client.backbones import Backbone, Batch, ImageBackbone
from share_client.data import IMAGE_OPTIONS, Field, Fit, Table, load_pictures, read_splits
from share_client.kinds.fitting import misfit
from share_client.kinds.kind import Rows
from share_client.tasks_file import TaskConfig, read_options
from share_core.errors import ConfigError

IMAGE = Field("image", (str, bytes, dict))
"""The name of an image file, relative to the table's directory, or its bytes."""


@dataclass(frozen=True)
class Pictured:
    """The rows of a table, and the images that they name or hold."""

    table: Table
    """The rows."""
    pixels: Tensor
    """(n, c, h, w) in [0, 1], of the shape that the backbone takes."""
    sizes: Tensor
    """Width and height (n, 2) of the images in their files, before they were resized."""


class PixelRows(Rows):
    """Images in memory, channels first, with targets of any shape."""

    def __init__(self, pixels: Tensor, targets: Tensor) -> None:
        self._pixels = pixels
        self._targets = targets

    def __len__(self) -> int:
        return len(self._targets)

    def lengths(self) -> Sequence[int]:
        """All images cost the same."""
        return [1] * len(self)

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Batch, Tensor]:
        """Return ``pixels`` (rows, c, h, w) and targets (rows, ...)."""
        index = torch.tensor(rows)
        return {"pixels": self._pixels[index].to(device)}, self._targets[index].to(device)


def image_backbone(config: TaskConfig, backbone: Backbone, kind: str) -> ImageBackbone:
    """Return the backbone if it takes images.

    Raises:
        ConfigError: it does not.
    """
    if isinstance(backbone, ImageBackbone):
        return backbone
    such_as = "digits-vit, a ResNet, timm:NAME or a Hugging Face vision model (docs/kinds-vision.md)"
    raise misfit(config.name, kind, backbone, "takes images", such_as)


def read_image_tables(
    config: TaskConfig,
    fields: Sequence[Field],
    shape: tuple[int, int, int],
    readers: Mapping[str, values.Reader],
) -> tuple[Pictured, Pictured, dict[str, Any]]:
    """Return training and test rows with their images, and the kind's own options.

    Args:
        config: the task.
        fields: what a row holds beside :data:`IMAGE`.
        shape: (channels, height, width) that the backbone takes.
        readers: the options of the kind beside those of images.

    Raises:
        ConfigError: unreadable data, an unknown option, or an image that does not fit.
    """
    options = read_options(config, {**IMAGE_OPTIONS, **readers})
    fit = Fit(shape, **{key: options.pop(key) for key in IMAGE_OPTIONS if key in options})
    train, test = read_splits(config, (IMAGE, *fields))
    return _pictured(train, fit), _pictured(test, fit), options


def _pictured(table: Table, fit: Fit) -> Pictured:
    base = table.path if table.path.is_dir() else table.path.parent
    pixels, sizes = load_pictures(table.columns["image"], base, fit, table.where)
    return Pictured(table, pixels.permute(0, 3, 1, 2).contiguous(), sizes)


def numbers(table: Table, name: str, shape: tuple[int | None, ...], expected: str) -> Tensor:
    """Return a column of nested lists of finite numbers as one tensor (rows, *shape).

    Args:
        table: the rows.
        name: the field.
        shape: length at each depth; None is whatever the first row has.
        expected: in words, for messages.

    Raises:
        ConfigError: naming the first row of another shape, or with something that is no finite number.
    """
    wanted: tuple[int, ...] | None = None
    found = []
    for row, value in enumerate(table.columns[name]):
        try:
            one = torch.tensor(value, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, OverflowError):
            raise ConfigError(f"{table.where(row)}: {name}: expected {expected}, got another list") from None
        fits = one.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, one.shape, strict=True))
        if not fits or (wanted is not None and tuple(one.shape) != wanted):
            shown = "" if wanted is None else f" of shape {list(wanted)} as in the first row"
            raise ConfigError(f"{table.where(row)}: {name}: expected {expected}{shown}, got shape {list(one.shape)}")
        if not one.isfinite().all():
            raise ConfigError(f"{table.where(row)}: {name}: expected finite numbers, got NaN or infinity")
        wanted = tuple(one.shape)
        found.append(one)
    return torch.stack(found)
