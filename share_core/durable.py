"""Files that are either whole or not there, also after a kill or a power cut.

Every write goes to a temporary name in the same directory, is flushed to the disk, renamed, and the directory is
flushed too. A failed flush is never tried again: after one the kernel may have dropped the pages.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

PRIVATE = 0o600
"""Mode of files that hold keys or anything learned from private data."""

PUBLIC = 0o644
"""Mode of files that anybody on the machine may read."""

TEMPORARY = ".tmp-"
"""Prefix of names that a crash may leave behind and that nobody reads."""


def flush_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_flushed(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    """Create ``path`` with ``data`` and flush it. Not atomic: for files inside a directory renamed later."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    """Replace ``path`` by ``data``: a reader sees the old bytes or the new ones, never a part."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        write_flushed(temporary, data, mode)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)
