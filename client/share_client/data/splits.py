"""Training and test rows of one task: from two files, or from one of which some rows are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from share_client.data.table import Field, Table, read_table
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError


def read_splits(config: TaskConfig, fields: Sequence[Field]) -> tuple[Table, Table]:
    """Return the training and the test rows of a task, cut to its ``rows`` and ``test_rows``.

    Without ``test`` in ``tasks.toml``, the share ``validation`` of the training file is held out and never trained on.

    Raises:
        ConfigError: as :func:`read_table`; optional fields in one split only; or a file too small to hold rows out.
    """
    if config.test is None:
        whole = read_table(config.train, fields, config.columns)
        kept, held = held_out(range(whole.rows), config.validation, f"{config.train}: task {config.name!r}")
        return whole.take(kept[: config.rows]), whole.take(held[: config.test_rows])
    train = read_table(config.train, fields, config.columns, config.rows)
    test = read_table(config.test, fields, config.columns, config.test_rows)
    for field in fields:
        if (field.name in train.columns) != (field.name in test.columns):
            raise ConfigError(
                f"task {config.name!r}: {field.name}: expected it in both files or in none, got it in one "
                f"({config.train if field.name in train.columns else config.test})"
            )
    return train, test


def held_out(keys: Sequence[int | str], share: float | None, where: str) -> tuple[list[int], list[int]]:
    """Return the indices of the rows that are trained on and of those, about the given share, that are held out.

    A row is held out by a hash of its key (its number, or its name) alone: rows that are added later never move an
    earlier row from one side to the other, so nothing is trained on that once was held out.

    Raises:
        ConfigError: no share, or one side would have no row.
    """
    if share is None:
        raise ConfigError(f"{where}: validation: expected a share to hold out, as there is no test, got none")
    kept: list[int] = []
    held: list[int] = []
    for row, key in enumerate(keys):
        digest = hashlib.sha256(f"fedshare/held-out/{key}".encode("utf-8", "surrogateescape")).digest()
        (held if int.from_bytes(digest[:8]) < share * 2**64 else kept).append(row)
    if not kept or not held:
        raise ConfigError(
            f"{where}: validation: expected rows on both sides, got {len(kept)} to train on and {len(held)} held out "
            f"of {len(keys)}; add rows, or give test = a file of its own"
        )
    return kept, held
