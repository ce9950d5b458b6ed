"""Rows out of files: which format a name means, and the rows of it one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from share_client.data.lines import read_lines
from share_core.errors import ConfigError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
"""Names that a table may end with; a directory is one of Hugging Face datasets."""


@dataclass(frozen=True)
class Source:
    """The rows of one file, not yet read."""

    path: Path
    """The file, for messages."""
    unit: str
    """What the numbers count: ``line``, from 1, or ``row``, from 0."""
    key: str
    """What a row's parts are called: ``key`` or ``column``."""
    rows: Iterator[tuple[int, Mapping[str, object]]]
    """Number and parts of each row; reading it may raise ConfigError."""
    names: Sequence[str] | None = None
    """All columns of the file, where :attr:`rows` has only those that are wanted."""
    typed: bool = True
    """Whether values have types of their own; otherwise all are strings, as in CSV."""


def open_source(path: Path, wanted: Sequence[str]) -> Source:
    """Return the rows of a file in the format of its name; columns that are not wanted need not be read.

    Raises:
        ConfigError: no known format, or a package that is not installed.
    """
    name = path.name.lower()
    if path.is_dir():
        from share_client.data.arrow import dataset_rows

        names, rows = dataset_rows(path, wanted)
        return Source(path, "row", "column", rows, names)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return Source(path, "line", "key", _json_rows(path))
    if name.endswith((".csv", ".csv.gz")):
        from share_client.data.delimited import csv_rows

        return Source(path, "line", "column", csv_rows(path), typed=False)
    if name.endswith(".parquet"):
        from share_client.data.arrow import parquet_rows

        names, rows = parquet_rows(path, wanted)
        return Source(path, "row", "column", rows, names)
    raise ConfigError(
        f"{path}: expected a table, a file that ends with {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}; "
        "save the data in one of these formats (docs/data.md)"
    )


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
            raise ConfigError(
                f"{where}: expected a JSON object, got {type(row).__name__}; write one object for each line"
            )
        yield number, row
