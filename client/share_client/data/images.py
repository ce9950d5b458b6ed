"""Labelled images: NumPy archives, folders of image files, and tables that name files or hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from share_client.data.folders import list_folder
from share_client.data.pictures import Fit, load_files, load_pictures
from share_client.data.sources import SUFFIXES as TABLE_SUFFIXES
from share_client.data.splits import held_out, read_splits
from share_client.data.table import Field, Table
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError

LABELLED_IMAGE = (Field("image", (str, bytes, dict)), Field("label", (int, str)))
"""What a row of a table of images holds: the name of a file or its bytes, and the label."""


@dataclass(frozen=True)
class ImageRows:
    """Images with their labels."""

    x: Tensor
    """(n, h, w, c) float32, from 0 to 1: integers are divided by the largest value of their type, floats are kept."""
    labels: tuple[int | str, ...]
    """One label for each image, as in the file; the name of its folder in a folder of images."""
    places: tuple[str, ...]
    """Where each image stands, for messages."""

    def take(self, rows: Sequence[int]) -> ImageRows:
        """Return the given rows, in the order given."""
        some = list(rows)
        return ImageRows(self.x[some], tuple(self.labels[i] for i in some), tuple(self.places[i] for i in some))


def read_image_splits(config: TaskConfig, fit: Fit) -> tuple[ImageRows, ImageRows]:
    """Return the training and the test images of a task, cut to its ``rows`` and ``test_rows``.

    ``train`` and ``test`` are ``.npz`` archives, folders with one folder of image files for each class, or tables of
    :data:`LABELLED_IMAGE`. Without ``test``, the share ``validation`` of the training images is held out: by number, as
    in :func:`~.splits.held_out`, or in a folder by name.

    Raises:
        ConfigError: unreadable data, images that do not fit, or too few to hold some out; names file and row.
    """
    kinds = {_format(path) for path in (config.train, config.test) if path is not None}
    if len(kinds) > 1:
        raise ConfigError(
            f"task {config.name!r}: test: expected {_format(config.train)} as in train, got another format"
        )
    if kinds == {TABLE}:
        train, test = read_splits(config, LABELLED_IMAGE)
        return _from_table(train, fit), _from_table(test, fit)
    if config.columns:
        raise ConfigError(f"task {config.name!r}: columns: expected none for {kinds.pop()}; take the key out")
    if kinds == {FOLDER}:
        return _from_folders(config, fit)
    if config.test is not None:
        train_rows, test_rows = read_images(config.train, config.rows), read_images(config.test, config.test_rows)
    else:
        whole = read_images(config.train)
        kept, held = held_out(range(len(whole.labels)), config.validation, f"{config.train}: task {config.name!r}")
        train_rows, test_rows = whole.take(kept[: config.rows]), whole.take(held[: config.test_rows])
    return _fitted(train_rows, fit, config.train), _fitted(test_rows, fit, config.test or config.train)


TABLE, FOLDER, ARCHIVE = "a table", "a folder of images", "an .npz archive"


def _format(path: Path) -> str:
    """Return which of the three forms of images is at a path."""
    if path.is_dir():
        return TABLE if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file() else FOLDER
    return TABLE if path.name.lower().endswith(TABLE_SUFFIXES) else ARCHIVE


def _fitted(rows: ImageRows, fit: Fit, path: Path) -> ImageRows:
    return replace(rows, x=fit.arrays(rows.x, str(path)))


def _from_table(table: Table, fit: Fit) -> ImageRows:
    base = table.path if table.path.is_dir() else table.path.parent
    pixels, _ = load_pictures(table.columns["image"], base, fit, table.where)
    return ImageRows(pixels, table.columns["label"], tuple(map(table.where, range(table.rows))))


def _from_folders(config: TaskConfig, fit: Fit) -> tuple[ImageRows, ImageRows]:
    listed = list_folder(config.train)
    if config.test is not None:
        splits = listed[: config.rows], list_folder(config.test)[: config.test_rows]
    else:
        where = f"{config.train}: task {config.name!r}"
        kept, held = held_out([one.key for one in listed], config.validation, where)
        splits = [listed[i] for i in kept][: config.rows], [listed[i] for i in held][: config.test_rows]
    train, test = (
        ImageRows(
            load_files([one.file for one in split], fit),
            tuple(one.label for one in split),
            tuple(str(one.file) for one in split),
        )
        for split in splits
    )
    return train, test


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
    places = tuple(f"{path}: row {row}" for row in range(len(pixels)))
    return ImageRows(x=pixels, labels=tuple(int(label) for label in y[:rows]), places=places)


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
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # zip, each of its compressions and NumPy have errors of their own for broken bytes
        raise ConfigError(f"{path}: cannot read images: {error}; save the archive anew") from error


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
