"""Comma-separated values, plain or gzip: a header, then one row for each record; quotes as in RFC 4180."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from share_client.data.lines import read_lines
from share_core.errors import ConfigError

_LONGEST_CELL = 64 << 20
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,4})?|[-+]?(nan|inf|infinity)", re.IGNORECASE)


def csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the line on which each row begins, from 1, and its cells by column.

    Raises:
        ConfigError: no header, a column twice, a row with more or fewer cells, or bad quotes; names the line.
    """
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader((line for _, line in read_lines(path)), strict=True)
    header: list[str] | None = None
    begins = 1
    while True:
        where = f"{path}: line {begins}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ConfigError(
                f"{where}: expected comma-separated cells, got what cannot be read ({error}); put cells with commas, "
                'quotes or line ends in "quotes" and write a quote inside as ""'
            ) from None
        if cells is None:
            return
        if header is None and cells:
            header = _header(cells, where)
        elif header is not None and cells:
            if len(cells) != len(header):
                raise ConfigError(
                    f"{where}: expected {len(header)} cells as in the header, got {len(cells)}; put cells with commas "
                    'in "quotes"'
                )
            yield begins, dict(zip(header, cells, strict=True))
        begins = reader.line_num + 1


def _header(cells: Sequence[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        raise ConfigError(f"{where}: expected commas between the columns, got semicolons, tabs or bars; save it as CSV")
    if len(set(header)) < len(header):
        raise ConfigError(
            f"{where}: expected columns with different names, got a name twice; the first line is the header"
        )
    return header


def parse_cell(cell: str, types: Sequence[type]) -> Any:
    """Return a cell as one of ``types``, or as the string it is where it can be none; None where it is empty.

    Where strings are allowed it stays a string, and :func:`settle` decides for the whole column.
    """
    if str in types:
        return cell if cell or len(types) == 1 else None
    text = cell.strip()
    if not text:
        return None
    if float in types and _NUMBER.fullmatch(text):
        return float(text)
    if int in types and _INTEGER.fullmatch(text):
        return int(text)
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if (list in types or dict in types) and text[0] in "[{":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return cell
    return cell


def settle(cells: Sequence[Any], types: Sequence[type]) -> Sequence[Any]:
    """Return a column of strings as integers where integers are allowed and every cell is one."""
    if str in types and int in types and all(_INTEGER.fullmatch(cell) for cell in cells):
        return [int(cell) for cell in cells]
    return cells
