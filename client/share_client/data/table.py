"""Tables of private rows: the columns that a kind of task asks for, from whatever file they are in.

What is wrong with a row is told by its number and never by what it holds: errors are written into logs. Names of
columns are not quoted either unless they are well known or nearly the one that was asked for, because the first line
of a file without a header is a row.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from share_client.data.delimited import parse_cell, settle
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
file_name filename path caption keypoints pose words tokens tags ner_tags
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
    and every number is returned as a float. All values of a column are of one type. In CSV, where all is text,
    a column that may be int or str is int if every cell is an integer, and lists and objects are JSON in a cell."""
    required: bool = True
    """Whether every row must have it. Otherwise all rows have it or none; null counts as not having it."""


@dataclass(frozen=True)
class Table:
    """Rows of private data, column by column."""

    columns: Mapping[str, tuple[Any, ...]]
    """One value for each row, by name of the field; only the fields that the file has."""
    path: Path
    """Where they were read."""
    unit: str
    """What :attr:`numbers` count: ``line``, from 1, or ``row``, from 0."""
    numbers: tuple[int, ...]
    """Where each row stands in the file."""

    @property
    def rows(self) -> int:
        """Number of rows, at least one."""
        return len(self.numbers)

    def where(self, row: int) -> str:
        """Return file and place of a row, for messages."""
        return f"{self.path}: {self.unit} {self.numbers[row]}"

    def take(self, rows: Sequence[int]) -> Table:
        """Return the given rows, in the order given."""
        columns = {name: tuple(values[row] for row in rows) for name, values in self.columns.items()}
        return replace(self, columns=columns, numbers=tuple(self.numbers[row] for row in rows))


def read_table(path: Path, fields: Sequence[Field], columns: Mapping[str, str], rows: int | None = None) -> Table:
    """Read the columns of ``fields`` from a file; the format is that of its name (see docs/data.md).

    Args:
        path: ``.jsonl``, ``.csv`` (both also with ``.gz``), ``.parquet``, or a directory of Hugging Face datasets.
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
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{path}: columns: unknown field {name!r}: expected some of {', '.join(sorted(known))}{hint}"
            )
    names = {field.name: columns.get(field.name, field.name) for field in fields}
    return _collect(open_source(path, list(names.values())), fields, names, rows)


def _collect(source: Source, fields: Sequence[Field], names: Mapping[str, str], rows: int | None) -> Table:
    """Read the rows of a source."""
    found: dict[str, list[Any]] = {field.name: [] for field in fields}
    numbers: list[int] = []
    for number, row in source.rows:
        if len(numbers) == rows:
            break
        numbers.append(number)
        where = f"{source.path}: {source.unit} {number}"
        for field in fields:
            values = found[field.name]
            value: Any = row.get(names[field.name])
            if value is not None and not source.typed:
                value = parse_cell(value, field.types)
            if value is None and field.required:
                raise _missing(where, field, names[field.name], row, source)
            if value is not None:
                values.append(_checked(value, field, where, values))
            if len(values) not in (0, len(numbers)):
                shown = _shown(field, names[field.name])
                raise ConfigError(f"{where}: {shown}: expected it in all rows or in none; fill it in or take it out")
    if not numbers:
        raise ConfigError(f"{source.path}: expected at least one row, got an empty file")
    columns = {
        field.name: tuple(found[field.name] if source.typed else settle(found[field.name], field.types))
        for field in fields
        if found[field.name]
    }
    return Table(columns, source.path, source.unit, tuple(numbers))


def _shown(field: Field, column: str) -> str:
    return field.name if field.name == column else f"{field.name} (column {column!r})"


def _missing(where: str, field: Field, column: str, row: Mapping[str, object], source: Source) -> ConfigError:
    """Say that a row lacks a value."""
    names = row if source.names is None else source.names
    if column in names:
        shown = _shown(field, column)
        return ConfigError(
            f"{where}: {shown}: expected {_expected(field)}, got nothing; fill it in or leave the row out"
        )
    among = ", ".join(sorted(name for name in names if name in _WELL_KNOWN)) or "no well-known name"
    plain = {name.strip().lower(): name for name in names}
    near = difflib.get_close_matches(column.lower(), plain, n=1, cutoff=0.8)
    hint = f"did you mean {plain[near[0]]!r}? " if near else ""
    return ConfigError(
        f"{where}: {source.key} {column!r} is missing; got {among} among {len(names)} {source.key}s; {hint}name the "
        f'right one in the [[task]]: columns = {{ {field.name} = "..." }}'
    )


def _expected(field: Field) -> str:
    return " or ".join(_WORDS[one] for one in field.types)


def _checked(value: Any, field: Field, where: str, before: Sequence[Any]) -> Any:
    """Return a value of one of the field's types, and of the same as the values before it."""
    if type(value) is int and float in field.types:
        value = _as_float(value)
    if type(value) not in field.types:
        gaps = type(value) is float and int in field.types
        hint = "; integers with gaps are often saved as floats: fill the gaps and save integers" if gaps else ""
        if type(value) is str and (list in field.types or dict in field.types):
            hint = '; write it as JSON, with double quotes, such as ["a", "b"] for a list'
        raise ConfigError(f"{where}: {field.name}: expected {_expected(field)}, got {type(value).__name__}{hint}")
    if before and type(value) is not type(before[0]):
        first, other = type(before[0]).__name__, type(value).__name__
        raise ConfigError(f"{where}: {field.name}: expected {first} as in the first row, got {other}")
    if not _finite(value):
        raise ConfigError(
            f"{where}: {field.name}: expected finite numbers, got NaN, infinity or one too large; leave such rows out"
        )
    if not _encodable(value):
        raise ConfigError(
            f"{where}: {field.name}: expected text, got half of a surrogate pair (a \\ud800 to \\udfff escape alone); "
            "write the file again with whole characters"
        )
    return value


def _as_float(value: int) -> float:
    """Return an integer as a float, infinity where it is too large to be one: it is then refused with the others."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _finite(value: Any) -> bool:
    """Return whether no number in a value, however deep in lists and objects, is NaN or infinite."""
    return all(math.isfinite(leaf) for leaf in _leaves(value) if isinstance(leaf, float))


def _encodable(value: Any) -> bool:
    """Return whether no string in a value, however deep in lists and objects, holds half of a surrogate pair."""
    try:
        for leaf in _leaves(value):
            if isinstance(leaf, str) and not leaf.isascii():
                leaf.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in lists and objects, keys too, or else the value; they may be deeper than Python's stack."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend((*one, *one.values()))
        else:
            yield one
