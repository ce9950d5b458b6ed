"""Tables of private rows: the columns that a kind of task asks for, from whatever file they are in.

What is wrong with a row is told by its number and never by what it holds: errors are written into logs. Names of
columns are not quoted either unless they are well known or nearly the one that was asked for, because the first line
of a file without a header is a row.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_client.data.sources import Source, open_source
from share_core.errors import ConfigError

_WORDS: Mapping[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}
_NAMES = """
text text_a text_b sentence sentence1 sentence2 premise hypothesis question context content document prompt response
completion instruction input output answer label labels class category target score gold id idx index image img file
file_name filename path caption keypoints pose
"""
_WELL_KNOWN = frozenset(_NAMES.split())
"""Names of columns that tell nothing of the data."""


@dataclass(frozen=True)
class Field:
    """One thing that a kind of task needs of every row."""

    name: str
    """Its name; ``columns`` in ``tasks.toml`` may give it a column of another name."""
    types: tuple[type, ...]
    """What a value may be: some of str, int, float, bool, list, dict, bytes. Where float is allowed, integers are too,
    and every number is returned as a float. All values of a column are of one type."""
    required: bool = True
    """Whether every row must have it. Otherwise all rows have it or none; an empty value counts as not having it."""


@dataclass(frozen=True)
class Table:
    """Rows of private data, column by column."""

    columns: Mapping[str, tuple[Any, ...]]
    """One value for each row, by name of the field; only the fields that the file has."""
    rows: int
    """Number of rows, at least one."""

    def take(self, rows: Sequence[int]) -> Table:
        """Return the given rows, in the order given."""
        return Table({name: tuple(values[row] for row in rows) for name, values in self.columns.items()}, len(rows))


def read_table(path: Path, fields: Sequence[Field], columns: Mapping[str, str], rows: int | None = None) -> Table:
    """Read the columns of ``fields`` from a file; the format is that of its name (see docs/data.md).

    Args:
        path: ``.jsonl`` or ``.jsonl.gz``.
        fields: what to read. Other columns are passed over.
        columns: name of the column for each field whose column is called otherwise, as in ``tasks.toml``.
        rows: at most the first so many rows. None: all.

    Raises:
        ConfigError: unreadable file, unknown field in ``columns``, a missing column, a value of another type, a number
            that is not finite, or no row at all; names file and row.
    """
    known = {field.name for field in fields}
    for name in columns:
        if name not in known:
            raise ConfigError(f"{path}: columns: unknown field {name!r}: expected some of {', '.join(sorted(known))}")
    source = open_source(path)
    values = _collect(source, fields, {field.name: columns.get(field.name, field.name) for field in fields}, rows)
    return Table(values, len(next(iter(values.values()))))


def _collect(
    source: Source, fields: Sequence[Field], names: Mapping[str, str], rows: int | None
) -> dict[str, tuple[Any, ...]]:
    """Return the values of every field that the file has."""
    found: dict[str, list[Any]] = {field.name: [] for field in fields}
    count = 0
    for number, row in source.rows:
        if count == rows:
            break
        count += 1
        where = f"{source.path}: {source.unit} {number}"
        for field in fields:
            column = names[field.name]
            value = row.get(column)
            if value is None and field.required:
                raise _missing(where, field, column, row, source)
            if value is not None:
                value = _checked(value, field, where, found[field.name])
                found[field.name].append(value)
            if len(found[field.name]) not in (0, count):
                raise ConfigError(f"{where}: {_shown(field, column)}: expected it in all rows or in none")
    if not count:
        raise ConfigError(f"{source.path}: expected at least one row, got an empty file")
    return {name: tuple(values) for name, values in found.items() if values}


def _shown(field: Field, column: str) -> str:
    return field.name if field.name == column else f"{field.name} (column {column!r})"


def _missing(where: str, field: Field, column: str, row: Mapping[str, object], source: Source) -> ConfigError:
    """Say that a row lacks a value."""
    if column in row:
        return ConfigError(
            f"{where}: {_shown(field, column)}: expected {_expected(field)}, got nothing; leave such rows out"
        )
    among = ", ".join(sorted(name for name in row if name in _WELL_KNOWN)) or "no name that is well known"
    near = difflib.get_close_matches(column.lower(), {str(name).strip().lower(): name for name in row}, n=1, cutoff=0.8)
    hint = next((str(name) for name in row if near and str(name).strip().lower() == near[0]), None)
    remedy = f"did you mean {hint!r}? " if hint is not None else ""
    return ConfigError(
        f"{where}: {source.key} {column!r} is missing; got {among} among {len(row)} {source.key}s; {remedy}name the "
        f'right one in the [[task]]: columns = {{ {field.name} = "..." }}'
    )


def _expected(field: Field) -> str:
    return " or ".join(_WORDS[one] for one in field.types)


def _checked(value: Any, field: Field, where: str, before: Sequence[Any]) -> Any:
    """Return a value of one of the field's types, and of the same as the values before it."""
    if type(value) is int and float in field.types:
        value = float(value)
    if type(value) not in field.types:
        raise ConfigError(f"{where}: {field.name}: expected {_expected(field)}, got {type(value).__name__}")
    if before and type(value) is not type(before[0]):
        first, other = type(before[0]).__name__, type(value).__name__
        raise ConfigError(f"{where}: {field.name}: expected {first} as in the first row, got {other}")
    if not _finite(value):
        raise ConfigError(f"{where}: {field.name}: expected finite numbers, got NaN or infinity; leave such rows out")
    if isinstance(value, str) and not value.isascii() and not _encodable(value):
        raise ConfigError(
            f"{where}: {field.name}: expected text, got half of a surrogate pair (a \\ud800 to \\udfff escape alone); "
            "write the file again with whole characters"
        )
    return value


def _finite(value: Any) -> bool:
    """Return whether no number in a value, however deep in lists and objects, is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(map(_finite, value))
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return True


def _encodable(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
