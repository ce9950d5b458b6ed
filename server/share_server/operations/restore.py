"""``share-server restore``: a server directory from a backup, after proving that the backup is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from share_core.errors import ConfigError
from share_server.layout import Layout
from share_server.operations.backup import (
    MARKER,
    OTHER_FILES,
    copy_flushed,
    flush_tree,
    make_partial,
    put_in_place,
    refusal,
)
from share_server.operations.reading import JOURNAL_FILES, Told, silent
from share_server.operations.verify import verify

WARNING = (
    "this server goes back to version {version}: updates that were acknowledged after the backup are not in it, and "
    "clients that have seen a later version refuse this hub: tell their members what happened, so that they remove the "
    "cache in the client's directory and go on, and submit again what is missing"
)
"""What restoring means for members; format with ``version``."""

_SHOWN = 3


def restore(backup: Path, directory: Path, told: Told = silent) -> int:
    """Verify ``backup`` and copy it to ``directory``, which must not exist; return the version it holds.

    Everything is copied, nothing linked: the server and its backup do not share a byte afterwards.

    Raises:
        ConfigError: it is no complete backup, it is damaged, or the directory exists or cannot be written.
    """
    partial = directory.with_name(directory.name + ".partial")
    if not (backup / MARKER).is_file():
        raise ConfigError(f"{backup} is no complete backup: it has no {MARKER}")
    for path in (directory, partial):
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists already: give a new name, or move it away")
    if not directory.parent.is_dir():
        raise ConfigError(f"{directory.parent} is no directory: make it first")
    if problems := verify(Layout(backup), told=told).problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConfigError(f"{backup} is damaged, and nothing was restored: {'; '.join(problems[:_SHOWN])}{more}")
    version = _version(backup)
    make_partial(partial)
    try:
        files = _files(backup)
        for done, path in enumerate(files, start=1):
            target = partial / path.relative_to(backup)
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            copy_flushed(path, target)
            told("files", done, len(files))
        for folder in ("fleet", "logs"):
            (partial / folder).mkdir(mode=0o700)
        flush_tree(partial)
        put_in_place(partial, directory)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise refusal(directory, error) from error
        raise
    return version


def _version(backup: Path) -> int:
    """Return the version that a backup says it holds."""
    try:
        return int(json.loads((backup / MARKER).read_text("utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{backup / MARKER} cannot be read ({error}), and nothing was restored") from error


def _files(backup: Path) -> list[Path]:
    found = [backup / name for name in OTHER_FILES if (backup / name).is_file()]
    for name in OTHER_FILES:
        found += sorted(path for path in (backup / name).glob("*") if path.is_file())
    found += [backup / "store" / name for name in JOURNAL_FILES if (backup / "store" / name).is_file()]
    return found + sorted((backup / "store" / "blobs").glob("*/*"))
