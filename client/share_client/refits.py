"""Backward transfer: when a task's coefficients are worth learning again because others have enlarged the subspace.

A task is trained once for its data. Later versions hold directions that it did not have, and some of them serve it. A
refit learns its coefficients again in the newest bases, from what is stored, without new directions and with nobody
else's data; it is sent only if it does better on the private test rows by more than their noise.

Three things keep this from going on for ever (docs/adr/0019): a refit adds no directions, so it is no growth for
anybody else; a task is looked at again only when the bases have grown by a fixed share since the last time; and no
data is refitted, or found not worth it, more than :data:`MOST_REFITS` times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from share_client.attempts import reason_of
from share_client.records import Records, TaskRecord
from share_client.session_log import SessionLog
from share_client.spending import Spending
from share_client.trainer import LocalTask, Refit, Step, Trained, Trainer
from share_core.errors import ConfigError
from share_core.space import columns_of
from share_core.types import Space

MOST_REFITS = 3
"""How often the same data is refitted, or looked at for a refit."""

GROWN = 1.25
"""How many times the basis vectors of the last training or try there must be before a task is looked at again."""

CLEARLY = 2.0
"""Standard errors by which a refit must be better on the test rows to be sent."""


def is_due(record: TaskRecord, task: LocalTask, columns: int) -> bool:
    """Whether a merged task is to be looked at in bases of ``columns`` vectors.

    Args:
        record: what is known of the task.
        task: with the hash of its data now; changed data is trained, not refitted.
        columns: :func:`~share_core.space.columns_of` the newest version.
    """
    trained = bool(record.heads) and record.heads[-1].content_hash == task.content_hash
    if not trained or record.refused_hash == task.attempt or record.columns == 0:
        return False
    return record.refits < MOST_REFITS and columns >= GROWN * record.columns


def is_better(found: Refit) -> bool:
    """Whether a refit does better on the test rows by more than their noise."""
    return found.trained is not None and found.after - found.before > CLEARLY * found.noise


def is_allowed(task: LocalTask) -> bool:
    """Whether a task may be refitted at all.

    Under noise a refit costs as much of the privacy as a training, so the owner must have set a budget. And whether it
    is sent tells something of the test rows, so the owner must have agreed that what is measured on them is reported.
    """
    if task.config is not None and not task.config.refit:
        return False
    return task.privacy is None or (task.privacy.limit is not None and task.privacy.report_metrics)


class Refits:
    """Finds tasks that are due and refits them."""

    def __init__(self, trainer: Trainer, records: Records, spending: Spending, log: SessionLog) -> None:
        self._trainer = trainer
        self._records = records
        self._spending = spending
        self._log = log

    def next(self, tasks: list[LocalTask], space: Space, task_id: Callable[[LocalTask], str]) -> LocalTask | None:
        """Return the first of ``tasks`` that is due in ``space``; None if none is."""
        columns = columns_of(space.bases)
        for task in tasks:
            due = is_due(self._records.get(task.name), task, columns)
            if due and is_allowed(task) and task_id(task) in space.cores and self._affordable(task):
                return task
        return None

    def _affordable(self, task: LocalTask) -> bool:
        """Whether the privacy budget, where there is one, allows one training more."""
        if task.privacy is None or task.config is None:
            return True
        try:
            self._spending.check(task.config, self._trainer.rows(task))
        except ConfigError:
            return False
        return True

    def run(self, task: LocalTask, space: Space, task_id: str, progress: Callable[[Step], None]) -> Trained | None:
        """Refit one task in ``space``; return what is to be sent, or None, which is recorded with its reason."""
        record = self._records.get(task.name)
        # Under noise the choice must not depend on gradients: only the growth of the bases, which is public, decides.
        before = record.captured if task.privacy is None else None
        try:
            found = self._trainer.refit(task, space, task_id, self._head(record), before, progress)
        except Exception as error:  # such as a head that no longer fits, after `rows` was changed
            reason = reason_of(error)
            self._records.not_refitted(task.name, columns_of(space.bases))
            self._log.write("refit", task=task.name, version=space.version, reason=reason)
            return None
        if found.trained is not None and found.trained.declared is not None:
            spent = self._spending.add(task.name, found.trained.declared)
            self._log.write("spent", **{**spent, "task": task.name})
        sent = is_better(found)
        line: dict[str, Any] = {
            "event": "refit",
            "task": task.name,
            "version": space.version,
            "sent": sent,
            "captured_before": record.captured,
            "captured": found.captured,
            "before": found.before,
            "after": found.after,
            "noise": found.noise,
            "reason": _reason(found, sent),
        }
        self._records.add_history(task.name, line)
        self._log.write(**line)
        if not sent:
            self._records.not_refitted(task.name, columns_of(space.bases))
            return None
        return found.trained

    def _head(self, record: TaskRecord) -> Mapping[str, Tensor]:
        return self._records.read_head(record.task, record.heads[-1])


def _reason(found: Refit, sent: bool) -> str:
    if found.trained is None:
        return f"the newer bases capture {found.captured:.3f} of its gradient, too little more than before"
    change = f"{found.before:.4f} became {found.after:.4f}, noise {found.noise:.4f}"
    return f"{change}: sent" if sent else f"{change}: the stored coefficients are kept"
