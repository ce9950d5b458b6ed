"""Text classification, single texts or pairs, from JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from share_client.backbones import Backbone, Batch, TextBackbone
from share_client.data import read_text
from share_client.kinds.classification import Classification, classes_of, indices_of
from share_client.kinds.kind import PreparedTask, Rows
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError


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
            ConfigError: unreadable data, pairs in one file only, or a backbone that takes no text.
        """
        if not isinstance(backbone, TextBackbone):
            raise ConfigError(
                f"task {config.name!r}: kind: expected image-classification for backbone {backbone.name}, "
                f"got {self.name}"
            )
        train, test = read_text(config.train, config.rows), read_text(config.test, config.test_rows)
        if (train.pairs is None) != (test.pairs is None):
            raise ConfigError(f"task {config.name!r}: text_b: expected it in both files or in none, got it in one")
        classes = classes_of(train.labels, test.labels, (config.train, config.test))
        tokens = [backbone.tokenize(split.texts, split.pairs, config.max_length) for split in (train, test)]
        return PreparedTask(
            config=config,
            kind=self,
            train=_Texts(tokens[0], indices_of(train.labels, classes), backbone),
            test=_Texts(tokens[1], indices_of(test.labels, classes), backbone),
            classes=classes,
        )
