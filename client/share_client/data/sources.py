"""Rows out of files: which format a name means, and the rows of it one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from share_client.data.lines import read_lines
from share_core.errors import ConfigError

SUFFIXES = (".jsonl", ".jsonl.gz")
"""Names that a table may end with."""


@dataclass(frozen=True)
class Source:
    """The rows of one file, not yet read."""

    path: Path
    """The file, for messages."""
    unit: str
    """What the numbers count: ``line`` or ``row``."""
    key: str
    """What a row's parts are called: ``key`` or ``column``."""
    rows: Iterator[tuple[int, Mapping[str, object]]]
    """Number and parts of each row; reading it may raise ConfigError."""


def open_source(path: Path) -> Source:
    """Return the rows of a file in the format of its name.

    Raises:
        ConfigError: the name ends with none of :data:`SUFFIXES`.
    """
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return Source(path, "line", "key", _json_rows(path))
    raise ConfigError(f"{path}: expected a file that ends with {', '.join(SUFFIXES)}, got {path.name!r}")


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield one JSON object for each line that is not blank."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            # Not chained: the error holds the whole line.
            raise ConfigError(f"{where}: expected one JSON object: {error.msg}, column {error.colno}") from None
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}: expected one JSON object, got a number too long or lists too deep") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield number, row
