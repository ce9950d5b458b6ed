"""What a task kind is: how its files become batches, and its head, loss and metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone, Batch
from share_client.sharing import schema_digest
from share_client.tasks_file import TaskConfig


class Rows(ABC):
    """One split of a task, ready for the backbone."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Return what each row costs; rows of like cost are put into one batch."""

    @abstractmethod
    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Batch, Tensor]:
        """Return inputs and targets of the given rows, on ``device``.

        Padding aside, those of a row may not depend on the other rows: splitting a step into parts and DP-SGD rely on
        it.
        """

    def at(self, step: int) -> Rows:
        """Return the rows as a step of training sees them, counted from 1: with noise of its own, if they have any."""
        return self


class Chosen(Rows):
    """Some rows of a split, in a given order."""

    def __init__(self, rows: Rows, chosen: Sequence[int]) -> None:
        self._rows = rows
        self._chosen = tuple(chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def lengths(self) -> Sequence[int]:
        """A row costs what it costs in the whole split."""
        lengths = self._rows.lengths()
        return [lengths[row] for row in self._chosen]

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Batch, Tensor]:
        """Return inputs and targets of the given ones of the chosen rows."""
        return self._rows.batch([self._chosen[row] for row in rows], device)

    def at(self, step: int) -> Rows:
        """Return the same ones of the rows at that step."""
        return Chosen(self._rows.at(step), self._chosen)


@dataclass(frozen=True)
class PreparedTask:
    """A task whose files are read, checked and tokenised for one backbone."""

    config: TaskConfig
    """The entry of ``tasks.toml``."""
    kind: Kind
    """Head, loss and metric."""
    train: Rows
    """Training rows."""
    test: Rows
    """Test rows, for evaluation only."""
    classes: tuple[int | str, ...]
    """Labels in order of their index: sorted, over training and test rows."""

    def at(self, step: int) -> PreparedTask:
        """Return the task with its training rows as a step sees them, see :meth:`Rows.at`."""
        return replace(self, train=self.train.at(step))

    @property
    def train_rows(self) -> int:
        """Number of training rows in use."""
        return len(self.train)

    @property
    def schema_sha256(self) -> str:
        """Hexadecimal SHA-256 of the kind and the labels in order: heads of one schema mean the same by an output."""
        return schema_digest(self.kind.name, self.classes)

    @property
    def test_rows(self) -> int:
        """Number of test rows in use."""
        return len(self.test)


class Kind(ABC):
    """One kind of task. It holds no state: two tasks of one kind may share the object."""

    name: str
    """As written in ``tasks.toml``."""
    metric: str
    """Name of the metric that is reported; larger is better."""

    @abstractmethod
    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read the task's files and fit them to the backbone.

        Raises:
            ConfigError: the files cannot be used, or the backbone takes no such data.
        """

    @abstractmethod
    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a fresh head for features of length ``width``, drawn from torch's global generator."""

    def outputs(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        """Return what :meth:`loss` and :meth:`judge` look at: here the head's outputs for the backbone's features."""
        out: Tensor = head(backbone.features(batch))
        return out

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the rows of a batch of each row's own loss, a scalar.

        The loss of a row may not depend on the other rows: splitting a step into parts and DP-SGD rely on it.
        """

    @abstractmethod
    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what the metric needs to know of one batch, (rows, n): of a whole split that is all that is kept."""

    @abstractmethod
    def score(self, judged: Tensor) -> float:
        """Return the metric of a whole split from what :meth:`judge` said of its batches, (all rows, n)."""

    def details(self, judged: Tensor) -> Mapping[str, float]:
        """Return other figures of a whole split by name, for people; none unless a kind has some."""
        return {}
