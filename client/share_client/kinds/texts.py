"""What kinds with texts share: tokenised rows, lists of strings, and the measure of what is found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from share_client.backbones import Backbone, Batch, TextBackbone
from share_client.data import Field, Table
from share_client.kinds.fitting import misfit
from share_client.kinds.kind import Rows
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError

TEXTS = (Field("text", (str,)), Field("text_b", (str,), required=False))
"""One text or two."""


class TextRows(Rows):
    """Tokenised texts, unpadded; a batch is padded to its own longest row."""

    def __init__(self, rows: Sequence[Mapping[str, list[int]]], targets: Tensor, backbone: TextBackbone) -> None:
        """Take the token columns of every row and what is to be learned of it, (rows, ...).

        Raises:
            ConfigError: a row has more tokens than the backbone has positions.
        """
        longest, most = max(len(row["input_ids"]) for row in rows), backbone.positions
        if most is not None and longest > most:
            raise ConfigError(
                f"max_length: expected rows of at most {most} tokens, the positions that backbone {backbone.name} has, "
                f"got one of {longest}; set max_length = {most} or less in tasks.toml"
            )
        self._rows = rows
        self._targets = targets
        self._backbone = backbone

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> Sequence[int]:
        """A row costs its tokens."""
        return [len(row["input_ids"]) for row in self._rows]

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Batch, Tensor]:
        """Return the token columns (rows, tokens) and targets (rows, ...)."""
        columns = self._backbone.collate([self._rows[row] for row in rows])
        inputs = {name: column.to(device) for name, column in columns.items()}
        return inputs, self._targets[torch.tensor(rows)].to(device)


def text_backbone(config: TaskConfig, backbone: Backbone) -> TextBackbone:
    """Return the backbone of a task with texts.

    Raises:
        ConfigError: it takes no text.
    """
    if isinstance(backbone, TextBackbone):
        return backbone
    such_as = "minilm or the directory of a Hugging Face text model (docs/kinds.md)"
    raise misfit(config.name, config.kind, backbone, "takes texts", such_as)


def text_rows(table: Table, targets: Tensor, backbone: TextBackbone, config: TaskConfig) -> TextRows:
    """Tokenise the texts of a table, cut to the task's ``max_length``."""
    tokens = backbone.tokenize(table.columns["text"], table.columns.get("text_b"), config.max_length)
    return TextRows(tokens, targets, backbone)


def strings_of(table: Table, field: str) -> tuple[list[str], ...]:
    """Return a column of lists of strings.

    Raises:
        ConfigError: a list holds another value or an empty string.
    """
    lists: tuple[list[str], ...] = table.columns[field]
    for row, strings in enumerate(lists):
        for one in strings:
            if not isinstance(one, str) or not one:
                got = "an empty one" if one == "" else f"{type(one).__name__}; write strings, such as names for numbers"
                raise ConfigError(
                    f"{table.where(row)}: {field}: expected a list of strings that are not empty, got {got}"
                )
    return lists


def micro_f1(counts: Tensor) -> float:
    """Return ``2 found / (2 found + in error + missed)`` of (rows, 3 or more); 1 where nothing is there or said."""
    found, wrong, missed = counts[:, :3].sum(dim=0).tolist()
    return 2 * found / (2 * found + wrong + missed) if found + wrong + missed else 1.0
