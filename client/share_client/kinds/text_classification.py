"""Text classification, single texts or pairs, from JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from share_client.backbones import Backbone, Batch, TextBackbone
from share_client.data import Field, Table, read_splits
from share_client.kinds.classification import Classification, classes_of, indices_of
from share_client.kinds.kind import PreparedTask, Rows
from share_client.tasks_file import TaskConfig, read_options
from share_core.errors import ConfigError

FIELDS = (Field("text", (str,)), Field("text_b", (str,), required=False), Field("label", (int, str)))
"""What a row holds: one text or two, and the label."""


class _Texts(Rows):
    """Tokenised texts, unpadded; a batch is padded to its own longest row."""

    def __init__(self, rows: Sequence[Mapping[str, list[int]]], targets: Tensor, backbone: TextBackbone) -> None:
        self._rows = rows
        self._targets = targets
        self._backbone = backbone

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> Sequence[int]:
        """A row costs its tokens."""
        return [len(row["input_ids"]) for row in self._rows]

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Batch, Tensor]:
        """Return the token columns (rows, tokens) and targets (rows,)."""
        columns = self._backbone.collate([self._rows[row] for row in rows])
        inputs = {name: column.to(device) for name, column in columns.items()}
        return inputs, self._targets[torch.tensor(rows)].to(device)


class TextClassification(Classification):
    """A label for each text or pair of texts."""

    name = "text-classification"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read and tokenise both files.

        Raises:
            ConfigError: unreadable data, pairs in one file only, an option, or a backbone that takes no text.
        """
        if not isinstance(backbone, TextBackbone):
            raise ConfigError(
                f"task {config.name!r}: kind: expected image-classification for backbone {backbone.name}, "
                f"got {self.name}"
            )
        read_options(config, {})
        train, test = read_splits(config, FIELDS)
        labels = (train.columns["label"], test.columns["label"])
        classes = classes_of(labels, config, test.where)

        def rows(table: Table, found: Sequence[int | str]) -> Rows:
            columns = table.columns
            tokens = backbone.tokenize(columns["text"], columns.get("text_b"), config.max_length)
            return _Texts(tokens, indices_of(found, classes), backbone)

        return PreparedTask(
            config=config,
            kind=self,
            train=rows(train, labels[0]),
            test=rows(test, labels[1]),
            classes=classes,
        )
