"""Ending a training early: rows that are held out of the training rows say when it no longer learns.

The test rows are not looked at: what is reported of them stays honest. The held-out rows are lost for training, which
is why this is not the default.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask, Rows
from share_client.kinds.kind import Chosen
from share_client.training.batches import sorted_batches
from share_client.training.steps import part_rows
from share_core.errors import ConfigError

HELD_OUT = 0.1
"""Share of the training rows that is held out."""


def held_out(task: PreparedTask, seed: int) -> tuple[PreparedTask, Rows]:
    """Return the task without a tenth of its training rows, and those rows. Deterministic in ``seed``.

    Raises:
        ConfigError: fewer than two rows: nothing would be left on one of the sides.
    """
    rows = task.train_rows
    if rows < 2:
        raise ConfigError(
            f"task {task.config.name!r}: patience needs at least 2 training rows to hold one out, got {rows}; take "
            "patience out"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = max(1, round(HELD_OUT * rows))
    return replace(task, train=Chosen(task.train, sorted(order[cut:]))), Chosen(task.train, order[:cut])


class EarlyStop:
    """Keeps the numbers of the pass with the lowest loss on the held-out rows."""

    def __init__(
        self,
        backbone: Backbone,
        task: PreparedTask,
        rows: Rows,
        head: nn.Module,
        trained: Sequence[Tensor],
        patience: int,
    ) -> None:
        """Watch ``trained``: parameters of ``head`` and of changes that are injected while this is used."""
        self._backbone = backbone
        self._task = task
        self._rows = rows
        self._head = head
        self._trained = trained
        self._patience = patience
        self._lowest = float("inf")
        self._waited = 0
        self._best: list[Tensor] = _copies(trained)

    def ended(self) -> bool:
        """Measure the loss after a pass; return whether it has not fallen for ``patience`` passes."""
        loss = self._loss()
        if loss < self._lowest:
            self._lowest, self._waited, self._best = loss, 0, _copies(self._trained)
            return False
        self._waited += 1
        return self._waited >= self._patience

    def restore(self) -> None:
        """Put the numbers of the best pass back."""
        with torch.no_grad():
            for parameter, best in zip(self._trained, self._best, strict=True):
                parameter.copy_(best)

    def _loss(self) -> float:
        """Return the mean loss of the held-out rows."""
        total = 0.0
        with torch.no_grad():
            for chosen in sorted_batches(self._rows, part_rows(self._task.config)):
                inputs, targets = self._rows.batch(chosen, self._backbone.device)
                outputs = self._task.kind.outputs(self._backbone, self._head, inputs)
                total += self._task.kind.loss(outputs, targets).item() * len(chosen)
        return total / len(self._rows)


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
