"""A hash of data files and directories, so that a session notices when a task's data changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from share_core.errors import ConfigError


def content_hash(*paths: Path) -> str:
    """Return the SHA-256 (hexadecimal) over the SHA-256 of each path, in the order given.

    That of a directory is the one over the name, inside it, and the SHA-256 of each file below it, in order of names.

    Raises:
        ConfigError: a file cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        total.update(_tree_digest(path) if path.is_dir() else _file_digest(path))
    return total.hexdigest()


def stamps(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of change (nanoseconds) of a file, or of every file below a directory.

    Raises:
        ConfigError: a file cannot be looked at.
    """
    found = []
    for file in _files(path):
        try:
            status = file.stat()
        except OSError as error:
            raise ConfigError(f"{file}: cannot look at the data file: {error}") from error
        found.append((str(file), status.st_size, status.st_mtime_ns))
    return found


def _files(path: Path) -> list[Path]:
    """Return the file, or every file below the directory, also in directories that a link leads to."""
    try:
        return sorted(_below(path, frozenset())) if path.is_dir() else [path]
    except OSError as error:
        raise ConfigError(f"{path}: cannot list the data: {error}") from error


def _below(directory: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    status = directory.stat()
    own = (status.st_dev, status.st_ino)
    if own in above:
        return  # a link to a directory that it lies in
    for path in directory.iterdir():
        if path.is_dir():
            yield from _below(path, above | {own})
        elif path.is_file():
            yield path


def _tree_digest(directory: Path) -> bytes:
    digest = hashlib.sha256()
    for file in _files(directory):
        name = file.relative_to(directory).as_posix().encode("utf-8", "surrogateescape")
        digest.update(len(name).to_bytes(8) + name + _file_digest(file))
    return digest.digest()


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the data file: {error}") from error
