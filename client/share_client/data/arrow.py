"""Parquet files and directories of Hugging Face datasets, both read as Arrow tables a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError

_PIECE = 1024
"""Rows that are held as Python values at once."""

Rows = Iterator[tuple[int, Mapping[str, object]]]
"""Number, from 0, and wanted columns of each row."""


def parquet_rows(path: Path, wanted: Sequence[str]) -> tuple[list[str], Rows]:
    """Return the names of all columns of a Parquet file and its rows.

    Raises:
        ConfigError: pyarrow is not installed, or the file is no Parquet.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow: pip install 'fedshare[data]'") from error
    try:
        with path.open("rb"):  # pyarrow's own message for a file that may not be opened is a puzzle
            file = pyarrow.parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read Parquet: {_first_line(error)}") from error
    some = [name for name in wanted if name in names]
    return names, _numbered(path, lambda: file.iter_batches(batch_size=_PIECE, columns=some))


def dataset_rows(path: Path, wanted: Sequence[str]) -> tuple[list[str], Rows]:
    """Return the names of all columns of a directory written by ``Dataset.save_to_disk`` and its rows.

    Images and the like are not decoded: they are objects with ``bytes`` and ``path``.

    Raises:
        ConfigError: datasets is not installed, or the directory is no single data set.
    """
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(one.name for one in path.iterdir() if one.is_dir())) or "none"
        raise ConfigError(
            f"{path}: expected one split of a datasets directory, got all of them; name one, for example "
            f'train = "{path.name}/train" (splits: {splits})'
        )
    if not (path / "state.json").is_file():
        raise ConfigError(
            f"{path}: expected a table in one file, or a directory written by save_to_disk of Hugging Face datasets, "
            "got a directory without state.json"
        )
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading a datasets directory needs datasets: pip install 'fedshare[data]'"
        ) from error
    try:
        found = datasets.load_from_disk(str(path)).with_format("arrow")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot read the datasets directory: {_first_line(error)}") from error
    names = list(found.column_names)
    some = [name for name in wanted if name in names]
    return names, _numbered(path, lambda: found.select_columns(some).iter(batch_size=_PIECE))


def _numbered(path: Path, pieces: Callable[[], Iterator[Any]]) -> Rows:
    """Yield the rows of Arrow tables as Python values."""
    number = 0
    try:
        for piece in pieces():
            for row in piece.to_pylist() if piece.num_columns else [{}] * piece.num_rows:
                yield number, row
                number += 1
    except (OSError, ValueError) as error:
        # Neither shown nor chained: what Arrow says of a value may quote it.
        raise ConfigError(
            f"{path}: cannot read the rows from about row {number} on ({type(error).__name__}); write the file again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
