"""A hash of data files, so that a session notices when a task's data changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from share_core.errors import ConfigError


def content_hash(*paths: Path) -> str:
    """Return the SHA-256 (hexadecimal) over the SHA-256 of each file, in the order given.

    Raises:
        ConfigError: a file cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the data file: {error}") from error
    return total.hexdigest()
