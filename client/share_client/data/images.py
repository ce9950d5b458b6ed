"""Images as NumPy archives: ``x`` (n, h, w) or (n, h, w, c) and ``y`` (n,)."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from share_client.data.splits import held_out
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError


@dataclass(frozen=True)
class ImageRows:
    """Images with their labels."""

    x: Tensor
    """(n, h, w, c) float32, from 0 to 1: integers are divided by the largest value of their type, floats are kept."""
    labels: tuple[int, ...]
    """One label for each image, as in the file."""

    def take(self, rows: Sequence[int]) -> ImageRows:
        """Return the given rows, in the order given."""
        return ImageRows(self.x[list(rows)], tuple(self.labels[row] for row in rows))


def read_image_splits(config: TaskConfig) -> tuple[ImageRows, ImageRows]:
    """Return the training and the test images of a task, cut to its ``rows`` and ``test_rows``.

    Without ``test`` in ``tasks.toml``, the share ``validation`` of the training images is held out, by number as in
    :func:`~.splits.held_out`.

    Raises:
        ConfigError: as :func:`read_images`, or too few images to hold some out.
    """
    if config.columns:
        raise ConfigError(f"task {config.name!r}: columns: expected none for an .npz archive; its arrays are x and y")
    if config.test is not None:
        return read_images(config.train, config.rows), read_images(config.test, config.test_rows)
    whole = read_images(config.train)
    kept, held = held_out(len(whole.labels), config.validation, f"{config.train}: task {config.name!r}")
    return whole.take(kept[: config.rows]), whole.take(held[: config.test_rows])


def read_images(path: Path, rows: int | None = None) -> ImageRows:
    """Read an ``.npz`` with ``x`` (n, h, w) or (n, h, w, c) and integer ``y`` (n,); at most the first ``rows``.

    Integer pixels are divided by the largest value of their type (255 for uint8); float pixels are taken as they are
    and expected in [0, 1]. Pickled objects inside the file are refused.

    Raises:
        ConfigError: unreadable file, missing array, wrong shape or type, or a pixel that is not finite; names the row.
    """
    x, y = _read_arrays(path)
    if x.ndim not in (3, 4) or x.shape[0] == 0 or 0 in x.shape:
        raise ConfigError(f"{path}: x: expected shape (n, h, w) or (n, h, w, c), got {x.shape}")
    if y.ndim != 1 or y.shape[0] != x.shape[0]:
        raise ConfigError(f"{path}: y: expected shape ({x.shape[0]},), one label for each image, got {y.shape}")
    if not np.issubdtype(y.dtype, np.integer):
        raise ConfigError(f"{path}: y: expected integer labels, got dtype {y.dtype}")
    pixels = torch.from_numpy(_scaled(x[:rows], path))
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(-1)
    return ImageRows(x=pixels, labels=tuple(int(label) for label in y[:rows]))


def _read_arrays(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return ``x`` and ``y`` of the archive."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ConfigError(f"{path}: expected an .npz archive with arrays x and y, got a single array")
            for name in ("x", "y"):
                if name not in archive.files:
                    raise ConfigError(f"{path}: expected arrays x and y, got {', '.join(archive.files) or 'none'}")
            return archive["x"], archive["y"]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(f"{path}: cannot read images: {error}") from error


def _scaled(x: np.ndarray[Any, Any], path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the pixels as float32."""
    if np.issubdtype(x.dtype, np.integer):
        return (x / np.float32(np.iinfo(x.dtype).max)).astype(np.float32)
    if not np.issubdtype(x.dtype, np.floating):
        raise ConfigError(f"{path}: x: expected integer or float pixels, got dtype {x.dtype}")
    finite = np.isfinite(x).reshape(x.shape[0], -1).all(axis=1)
    if not finite.all():
        raise ConfigError(f"{path}: row {int(np.argmin(finite))}: x holds NaN or infinity, expected finite pixels")
    return x.astype(np.float32)
