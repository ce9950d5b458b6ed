"""Images as NumPy archives: ``x`` (n, h, w) or (n, h, w, c) and ``y`` (n,)."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from share_core.errors import ConfigError


@dataclass(frozen=True)
class ImageRows:
    """Images with their labels."""

    x: Tensor
    """(n, h, w, c) float32, from 0 to 1: integers are divided by the largest value of their type, floats are kept."""
    labels: tuple[int, ...]
    """One label for each image, as in the file."""


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
