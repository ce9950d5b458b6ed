"""Folders of images: one folder for each class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from share_client.data.pictures import SUFFIXES
from share_core.errors import ConfigError

_LITTER = ("thumbs.db", "desktop.ini")
"""What file managers leave in folders."""


@dataclass(frozen=True)
class Listed:
    """One image file with its class."""

    file: Path
    """Where it is."""
    label: str
    """Name of the folder it is in."""

    @property
    def key(self) -> str:
        """Class and file name, which say which image it is however many others there are."""
        return f"{self.label}/{self.file.name}"


def list_folder(path: Path) -> list[Listed]:
    """Return all images of a folder, those of the classes mixed in an order that depends on their names alone.

    Raises:
        ConfigError: no class folders, one without images, or files that are none; names the file.
    """
    found = []
    for one in _shown(path):
        if not one.is_dir():
            raise ConfigError(
                f"{one}: expected one folder for each class in {path}, got a file; put it into that of its class, "
                "or name a CSV or JSONL with image and label as train"
            )
        images = _images(one)
        if not images:
            raise ConfigError(f"{one}: expected images of the class, got an empty folder; fill it or take it out")
        found += [Listed(file, one.name) for file in images]
    if not found:
        raise ConfigError(f"{path}: expected one folder for each class with images in it, got an empty folder")
    return sorted(found, key=lambda one: hashlib.sha256(one.key.encode("utf-8", "surrogateescape")).digest())


def _shown(folder: Path) -> list[Path]:
    try:
        return sorted(
            one for one in folder.iterdir() if not one.name.startswith(".") and one.name.lower() not in _LITTER
        )
    except OSError as error:
        raise ConfigError(f"{folder}: cannot list the folder: {error}") from error


def _images(folder: Path) -> list[Path]:
    files = _shown(folder)
    for file in files:
        if file.is_dir() or not file.name.lower().endswith(SUFFIXES):
            got = "a folder" if file.is_dir() else repr(file.suffix or "no ending")
            raise ConfigError(
                f"{file}: expected an image ({', '.join(SUFFIXES)}) in the folder of a class, got {got}; save it "
                "as one of these or take it out"
            )
    return files
