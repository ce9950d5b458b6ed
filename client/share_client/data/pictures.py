"""Image files, and images inside tables, as pixels of the size that a backbone takes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from share_client import values
from share_client.tasks_file import TaskConfig, read_options
from share_core.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Names that an image file may end with."""
_MODES = {1: "L", 3: "RGB"}
IMAGE_OPTIONS = {"resize": values.boolean, "convert": values.boolean}
"""What ``[task.options]`` may say of images: whether they are resized to what the backbone takes, and whether colours
are made grey, or greys, palettes and transparency made colours, as it takes them. Both are false unless said."""


@dataclass(frozen=True)
class Fit:
    """What images must be, and what may be done to make them so."""

    shape: tuple[int, int, int]
    """(channels, height, width) that the backbone takes."""
    resize: bool = False
    """Whether other sizes are resized, by area where they shrink; otherwise they are refused."""
    convert: bool = False
    """Whether other colours are converted; otherwise they are refused."""

    @classmethod
    def of(cls, config: TaskConfig, shape: tuple[int, int, int]) -> Fit:
        """Return what the options of a task say; ``shape`` is (channels, height, width) of the backbone.

        Raises:
            ConfigError: an option that images do not have, or one that is neither true nor false.
        """
        return cls(shape, **read_options(config, IMAGE_OPTIONS))

    def arrays(self, pixels: Tensor, where: str) -> Tensor:
        """Return images (n, h, w, c) in [0, 1] as (n, h, w, c) of the wanted shape.

        Raises:
            ConfigError: another size or number of channels that may not be changed.
        """
        channels, height, width = self.shape
        if pixels.shape[3] != channels:
            if not self.convert or {pixels.shape[3], channels} != {1, 3}:
                raise ConfigError(f"{where}: {self._other(pixels.shape[2], pixels.shape[1], pixels.shape[3])}")
            if channels == 3:
                pixels = pixels.expand(-1, -1, -1, 3)
            else:
                pixels = (pixels * torch.tensor([0.299, 0.587, 0.114])).sum(dim=3, keepdim=True)  # ITU-R BT.601
        if tuple(pixels.shape[1:3]) != (height, width):
            if not self.resize:
                raise ConfigError(f"{where}: {self._other(pixels.shape[2], pixels.shape[1], pixels.shape[3])}")
            first = pixels.permute(0, 3, 1, 2)
            resized = torch.nn.functional.interpolate(
                first, size=(height, width), mode="bilinear", align_corners=False, antialias=True
            )
            pixels = resized.clamp(0, 1).permute(0, 2, 3, 1)
        return pixels.contiguous()

    def _other(self, width: int, height: int, channels: int) -> str:
        wanted, tall, wide = self.shape
        keys = ["resize = true"] * ((height, width) != (tall, wide)) + ["convert = true"] * (channels != wanted)
        return (
            f"expected images of {tall} x {wide} with {wanted} channel(s) for the backbone, got {height} x {width} "
            f"with {channels}; change the files, or say {' and '.join(keys)} in [task.options]"
        )

    def picture(self, opened: Any, where: str) -> NDArray[np.uint8]:
        """Return an opened pillow image as (h, w, c) of the wanted shape.

        Raises:
            ConfigError: another size or other colours that may not be changed.
        """
        channels, height, width = self.shape
        if channels not in _MODES:
            raise ConfigError(f"{where}: the backbone takes {channels} channels: expected 1 or 3 for image files")
        mode = _MODES[channels]
        if opened.mode in ("I", "F"):
            raise ConfigError(
                f"{where}: expected an image of 8 or 16 bits a channel, got mode {opened.mode}, whose numbers do not "
                "say what is white; scale them to 255 or 65535 and save it with 8 or 16 bits"
            )
        if opened.mode != mode:
            if not self.convert:
                raise ConfigError(
                    f"{where}: expected an image of mode {mode} ({channels} channel(s)) for the backbone, got mode "
                    f"{opened.mode}; change the file, or say convert = true in [task.options]"
                )
            opened = _of_8_bits(opened).convert(mode)
        if opened.size != (width, height):
            if not self.resize:
                raise ConfigError(f"{where}: {self._other(opened.width, opened.height, channels)}")
            from PIL import Image

            opened = opened.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(opened, dtype=np.uint8).reshape(height, width, channels)


def _of_8_bits(opened: Any) -> Any:
    """Return a grey image of 16 bits as one of 8, and any other as it is: pillow would cut all above 255 to white."""
    if not opened.mode.startswith("I;16"):
        return opened
    from PIL import Image

    return Image.fromarray(np.rint(np.asarray(opened) / 257).astype(np.uint8))  # 65535 / 255


def load_pictures(values: Sequence[Any], base: Path, fit: Fit, where: Callable[[int], str]) -> tuple[Tensor, Tensor]:
    """Return images as float32 (n, h, w, c) in [0, 1], of the shape of ``fit``, and width and height of each file.

    Args:
        values: for each row the name of a file (relative to ``base``), the bytes of one, or an object with ``bytes``
            or ``path``, as Hugging Face datasets write images.
        base: directory that names are relative to.
        fit: the shape, and what may be changed.
        where: says of a row's number where it stands, for messages. Names of files are not quoted: they are the row's.

    Raises:
        ConfigError: pillow is not installed, a file that is missing or no image, or one that does not fit.
    """
    return _stacked((_read(value, base, fit, where(row)) for row, value in enumerate(values)), len(values), fit)


def load_files(files: Sequence[Path], fit: Fit) -> Tensor:
    """Return image files as float32 (n, h, w, c) in [0, 1], of the shape of ``fit``.

    Raises:
        ConfigError: as :func:`load_pictures`; names the file.
    """
    return _stacked((_decoded(file, fit, str(file)) for file in files), len(files), fit)[0]


_Picture = tuple[NDArray[np.uint8], tuple[int, int]]
"""(h, w, c) of the wanted shape, and width and height of the file."""


def _stacked(pictures: Iterable[_Picture], count: int, fit: Fit) -> tuple[Tensor, Tensor]:
    channels, height, width = fit.shape
    pixels, sizes = torch.empty(count, height, width, channels), torch.empty(count, 2)
    for row, (picture, size) in enumerate(pictures):
        pixels[row] = torch.from_numpy(picture.copy())
        sizes[row] = torch.tensor(size)
    return pixels.div_(255), sizes


def _read(value: Any, base: Path, fit: Fit, where: str) -> _Picture:
    """Return the image that one value of a table is or names."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return _decoded(io.BytesIO(value), fit, f"{where}: image")
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: image: expected the name of a file, or its bytes, got {type(value).__name__}")
    file = base / value
    if not _is_file(file):
        raise ConfigError(
            f"{where}: image: expected the name of a file in {base}, got one that does not exist there; names are "
            "relative to the directory of the table, and base64 is not read: save the images as files, or as bytes in "
            "Parquet"
        )
    return _decoded(file, fit, f"{where}: image")


def _is_file(file: Path) -> bool:
    """Return whether there is such a file; what cannot even be a name, such as one too long, is none."""
    try:
        return file.is_file()
    except (OSError, ValueError):  # which hold the whole value
        return False


def _decoded(file: Path | io.BytesIO, fit: Fit, where: str) -> _Picture:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigError(f"{where}: reading image files needs pillow: pip install 'fedshare[data]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of the file's metadata
            with Image.open(file) as opened:
                opened.load()
                return fit.picture(opened, where), opened.size
    except UnidentifiedImageError:
        raise ConfigError(
            f"{where}: expected an image, got a file that is none; leave it out or save it anew"
        ) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ConfigError(f"{where}: expected an image of less than 90 million pixels; make it smaller") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        kind = type(error).__name__
        raise ConfigError(f"{where}: cannot read the image, it may be cut off ({kind}); save it anew") from None
