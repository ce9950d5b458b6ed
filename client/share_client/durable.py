"""JSON lines, private directories and removal at once, on top of the whole files of :mod:`share_core.durable`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from share_core.durable import PRIVATE, TEMPORARY, flush_directory


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it. A crash may leave a part of the last line; readers drop it.

    Raises:
        OSError: not all of it is on the disk, for example because the disk is full.
    """
    new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, PRIVATE)
    with os.fdopen(handle, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()  # one bare write may take a part and report no error
        os.fsync(file.fileno())
    if new:
        flush_directory(path.parent)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file; nothing if it does not exist. Torn lines are dropped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return indented JSON with sorted keys, ending in a newline."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def make_private_directory(path: Path) -> Path:
    """Create a directory that only its owner may enter, parents included; return it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def remove_tree(path: Path) -> None:
    """Remove a directory so that a crash leaves either all of it or only a temporary name nobody reads."""
    hidden = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    path.rename(hidden)
    flush_directory(path.parent)
    shutil.rmtree(hidden)


def sweep(directory: Path) -> None:
    """Remove what earlier crashes left under temporary names in a directory that nobody writes to now."""
    for leftover in directory.glob(f"{TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
