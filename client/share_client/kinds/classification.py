"""What both classification kinds share: a linear head, cross entropy and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from share_client.kinds.kind import Kind, PreparedTask
from share_client.tasks_file import TaskConfig
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


Labels = Sequence[int | str]


def classes_of(splits: tuple[Labels, Labels], config: TaskConfig, where: Callable[[int], str]) -> tuple[int | str, ...]:
    """Return the sorted labels of training and test rows.

    ``where`` says of a test row where it stands. A class that only test rows have cannot be learned; it is let pass
    only where ``rows`` cuts the training rows short.

    Raises:
        ConfigError: one split has strings and the other integers, there is only one class, an empty label, or a class
            without training rows.
    """
    train, test = splits
    file = f"{config.train}: label"
    if type(train[0]) is not type(test[0]):
        got = type(test[0]).__name__
        raise ConfigError(f"{where(0)}: label: expected {type(train[0]).__name__} as in {config.train.name}, got {got}")
    found = {*train, *test}
    if len(found) < 2:
        raise ConfigError(f"{file}: expected at least two classes, got one")
    if "" in found:
        raise ConfigError(f"{file}: expected labels that say something, got an empty one; fill it in")
    known = set(train)
    alien = [row for row, label in enumerate(test) if label not in known]
    if alien and config.rows is None:
        remedy = "add training rows of it" if config.test is not None else "hold out less, or add rows of it"
        raise ConfigError(
            f"{where(alien[0])}: label: expected one of the {len(known)} classes of the training rows, got another, as "
            f"in {len(alien)} test row(s): it cannot be learned; {remedy}, or leave its test rows out"
        )
    return tuple(sorted(found, key=lambda label: (str(label) if isinstance(label, str) else "", label)))


def indices_of(labels: Sequence[int | str], classes: Sequence[int | str]) -> Tensor:
    """Return the class index of each label, (rows,) int64."""
    index = {label: number for number, label in enumerate(classes)}
    return torch.tensor([index[label] for label in labels])
