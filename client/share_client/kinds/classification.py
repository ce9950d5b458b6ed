"""What both classification kinds share: a linear head, cross entropy and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from share_client.kinds.kind import Kind, PreparedTask
from share_core.errors import ConfigError


class Classification(Kind):
    """A label out of a fixed list for each row."""

    metric = "accuracy"

    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a linear map from features to one score for each class."""
        return nn.Linear(width, len(task.classes))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        return nn.functional.cross_entropy(outputs, targets)

    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return whether the best-scored class is the target, (rows, 1)."""
        return (outputs.argmax(dim=1) == targets).unsqueeze(1)

    def score(self, judged: Tensor) -> float:
        """Return the fraction of rows whose best-scored class is the target."""
        return float(judged.double().mean())


def classes_of(
    train: Sequence[int | str], test: Sequence[int | str], paths: tuple[Path, Path]
) -> tuple[int | str, ...]:
    """Return the sorted labels of both splits.

    Raises:
        ConfigError: one split has strings and the other integers, or there is only one class.
    """
    if type(train[0]) is not type(test[0]):
        raise ConfigError(
            f"{paths[1]}: label: expected {type(train[0]).__name__} as in {paths[0].name}, got {type(test[0]).__name__}"
        )
    found = {*train, *test}
    if len(found) < 2:
        raise ConfigError(f"{paths[0]}: label: expected at least two classes, got one")
    return tuple(sorted(found, key=lambda label: (str(label) if isinstance(label, str) else "", label)))


def indices_of(labels: Sequence[int | str], classes: Sequence[int | str]) -> Tensor:
    """Return the class index of each label, (rows,) int64."""
    index = {label: number for number, label in enumerate(classes)}
    return torch.tensor([index[label] for label in labels])
