"""Multi-label text classification: any number of labels for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.data import Field, read_splits
from share_client.kinds.kind import Kind, PreparedTask
from share_client.kinds.texts import TEXTS, micro_f1, strings_of, text_backbone, text_rows
from share_client.tasks_file import TaskConfig, read_options
from share_core.errors import ConfigError

FIELDS = (*TEXTS, Field("labels", (list,)))
"""What a row holds: one text or two, and a list of labels, which may be empty."""


class TextMultiLabel(Kind):
    """Any of a fixed list of labels for each text; each is decided on its own."""

    name = "text-multi-label"
    metric = "micro-f1"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read and tokenise both files.

        Raises:
            ConfigError: unreadable data, labels that are no strings, a label that no training row has (unless ``rows``
                cuts them short), an option, or a backbone that takes no text.
        """
        takes = text_backbone(config, backbone)
        read_options(config, {})
        train, test = read_splits(config, FIELDS)
        found = [[set(labels) for labels in strings_of(table, "labels")] for table in (train, test)]
        known = set().union(*found[0])
        if not known:
            raise ConfigError(f"{config.train}: labels: expected at least one label in the training rows, got none")
        alien = [row for row, labels in enumerate(found[1]) if not labels <= known]
        if alien and config.rows is None:
            raise ConfigError(
                f"{test.where(alien[0])}: labels: expected some of the {len(known)} labels of the training rows, got "
                "another: it cannot be learned; add training rows of it, or take it out"
            )
        classes = tuple(sorted(known.union(*found[1])))
        targets = [torch.tensor([[float(one in row) for one in classes] for row in split]) for split in found]
        return PreparedTask(
            config=config,
            kind=self,
            train=text_rows(train, targets[0], takes, config),
            test=text_rows(test, targets[1], takes, config),
            classes=classes,
        )

    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a linear map from features to one score for each label."""
        return nn.Linear(width, len(task.classes))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean binary cross entropy over rows and labels."""
        return nn.functional.binary_cross_entropy_with_logits(outputs.float(), targets)

    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how many labels of each row are found, found in error, and missed, (rows, 3)."""
        said, true = outputs > 0, targets > 0.5
        return torch.stack([said & true, said & ~true, ~said & true], dim=2).sum(dim=1)

    def score(self, judged: Tensor) -> float:
        """Return micro F1, ``2 found / (2 found + in error + missed)``; 1 where there is no label and none is said."""
        return micro_f1(judged)

    def details(self, judged: Tensor) -> Mapping[str, float]:
        """Return the fraction of rows whose labels are all right."""
        return {"exact_match": float((judged[:, 1:].sum(dim=1) == 0).double().mean())}
