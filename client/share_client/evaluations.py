"""Measuring the own tasks on their private test rows, version by version, and reporting what may be told of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from share_client.attempts import reason_of
from share_client.link import HubLink, patiently
from share_client.records import Records
from share_client.session_log import SessionLog
from share_client.trainer import LocalTask, Trainer
from share_core.errors import FedshareError
from share_core.space import task_adapter
from share_core.types import Space
from share_proto.v1 import hub_pb2


class Evaluations:
    """Evaluates each version once for each task that it holds."""

    def __init__(
        self,
        trainer: Trainer,
        records: Records,
        link: HubLink,
        log: SessionLog,
        stop: threading.Event,
        task_id: Callable[[LocalTask], str],
        check_backbone: Callable[[], None],
    ) -> None:
        """Measure by ``trainer``; ``check_backbone`` is called before, and raises where the backbone is another one."""
        self._trainer = trainer
        self._records = records
        self._link = link
        self._log = log
        self._stop = stop
        self._task_id = task_id
        self._check_backbone = check_backbone
        self._told: set[tuple[str, str]] = set()
        self.reported = 0
        """Evaluations that the hub has."""

    def evaluate(self, tasks: Sequence[LocalTask], space: Space) -> None:
        """Measure the tasks that ``space`` holds and that were not measured in it before; report and remember it."""
        measured = [(task, line) for task in tasks if (line := self._measured(task, space)) is not None]
        if not measured:
            return
        evaluations = [
            hub_pb2.Evaluation(
                task_id=self._task_id(task),
                version=line["version"],
                metric=line["metric"],
                value=line["value"],
                rows=line["rows"],
            )
            for task, line in measured
            if task.reports
        ]
        # Reported first, remembered after: a crash in between repeats the same value, which the hub replaces.
        if not evaluations or patiently(lambda: self._link.report(evaluations), self._stop, self._waiting) is not None:
            for _, line in measured:
                self._records.add_history(line["task"], {"event": "evaluation", **line})
                self._log.write("evaluation", **line)
            self.reported += len(evaluations)

    def _measured(self, task: LocalTask, space: Space) -> dict[str, Any] | None:
        """Return what one task reaches in ``space``; None where it is not in it, or cannot be measured."""
        head = self._records.get(task.name).head_at(space.version)
        task_id = self._task_id(task)
        known = head is not None and head.content_hash == task.content_hash and task_id in space.cores
        if head is None or not known or self._records.is_evaluated(task.name, space.version):
            return None
        self._check_backbone()
        adapter = task_adapter(space, task_id)
        try:
            found = self._trainer.evaluate(task, adapter, self._records.read_head(task.name, head))
        except Exception as error:  # its rows or settings may have changed; the others go on
            self._unmeasured(task, space, reason_of(error))
            return None
        self._told = {(name, reason) for name, reason in self._told if name != task.name}
        return {"task": task.name, "version": space.version, **vars(found)}

    def _unmeasured(self, task: LocalTask, space: Space, reason: str) -> None:
        """Say once why a task is not measured."""
        if (task.name, reason) not in self._told:
            self._told.add((task.name, reason))
            self._log.write("unmeasured", task=task.name, version=space.version, reason=reason)

    def _waiting(self, error: FedshareError) -> None:
        self._log.write("waiting", reason=str(error))
