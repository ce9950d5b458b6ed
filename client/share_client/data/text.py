"""Text as JSON lines, plain or gzip: ``text``, optional ``text_b``, and an integer or string ``label``.

What is wrong with a row is told by its line and never by what it holds: errors are written into logs.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from share_core.errors import ConfigError

Label = int | str


@dataclass(frozen=True)
class TextRows:
    """Texts with their labels."""

    texts: tuple[str, ...]
    """First (or only) text of each row."""
    pairs: tuple[str, ...] | None
    """Second text of each row, or None where the file has no ``text_b``."""
    labels: tuple[Label, ...]
    """All integers or all strings, as in the file."""


def read_text(path: Path, rows: int | None = None) -> TextRows:
    """Read ``.jsonl`` or ``.jsonl.gz``; at most the first ``rows`` rows. Blank lines are passed over.

    Raises:
        ConfigError: unreadable file, a line that is no JSON object, a missing or wrong field; names the line.
    """
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[Label] = []
    for number, line in _lines(path):
        if rows is not None and len(texts) == rows:
            break
        text, pair, label = _row(line, f"{path}: line {number}")
        texts.append(text)
        labels.append(label)
        if pair is not None:
            pairs.append(pair)
        if type(label) is not type(labels[0]):
            raise ConfigError(
                f"{path}: line {number}: label: expected {type(labels[0]).__name__} as in the first row, "
                f"got {type(label).__name__}"
            )
        if pairs and len(pairs) != len(texts):
            raise ConfigError(f"{path}: line {number}: text_b: expected it in all rows or in none")
    if not texts:
        raise ConfigError(f"{path}: expected at least one row, got an empty file")
    return TextRows(texts=tuple(texts), pairs=tuple(pairs) if pairs else None, labels=tuple(labels))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield non-blank lines with their numbers, from 1."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
            stream = io.TextIOWrapper(raw, encoding="utf-8")
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read text: {error}") from error


def _row(line: str, where: str) -> tuple[str, str | None, Label]:
    """Parse one line into text, second text and label."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        # Not chained: the error holds the whole line.
        raise ConfigError(f"{where}: expected one JSON object: {error.msg}, column {error.colno}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected a JSON object with text and label, got {type(row).__name__}")
    for key in ("text", "label"):
        if key not in row:
            found = ", ".join(name for name in ("text", "text_b", "label") if name in row) or "neither"
            raise ConfigError(f"{where}: key {key!r} is missing; got {found} among {len(row)} keys")
    text, pair, label = row["text"], row.get("text_b"), row["label"]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: text: expected a string, got {type(text).__name__}")
    if pair is not None and not isinstance(pair, str):
        raise ConfigError(f"{where}: text_b: expected a string, got {type(pair).__name__}")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ConfigError(f"{where}: label: expected an integer or a string, got {type(label).__name__}")
    return text, pair, label
