"""What the trainings of each task have spent of their privacy, whatever became of their updates.

::

    tasks/<task>/spent.jsonl    one object a line: what a training declared, and epsilon and delta of all so far

A training is written down when its update is on the disk and before it enters the outbox, so nothing that carries noise
leaves uncounted; after a crash in between it is counted although it stayed. The hub counts what it has published; this
counts what it may have seen.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from share_client.durable import append_line, make_private_directory, read_json_lines
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError
from share_core.privacy import Declaration, declaration_from_text, declaration_to_text


class Spending:
    """The spendings of one client directory; ``directory`` is that of the task records."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def total(self, task: str) -> dict[str, Any] | None:
        """Return the newest line of a task: ``epsilon`` and ``delta`` of all its trainings; None if there is none."""
        lines = list(read_json_lines(self._path(task)))
        return lines[-1] if lines else None

    def check(self, task: TaskConfig, rows: int) -> None:
        """Refuse a training that would spend more than the task's budget.

        Raises:
            ConfigError: naming both figures.
        """
        from share_client.training import declare, total_epsilon

        declared = declare(task, rows)
        if declared is None or task.privacy is None or task.privacy.limit is None:
            return
        known = self._declarations(task.name)
        after = total_epsilon([*known, declared])
        if after > task.privacy.limit:
            raise ConfigError(
                f"task {task.name!r}: its privacy budget is spent: {len(known)} trainings and this one come to epsilon "
                f"{after:.3f}, more than {task.privacy.limit:g}; a larger budget in [privacy] allows it"
            )

    def add(self, task: str, declared: Declaration) -> dict[str, Any]:
        """Write down one training durably, before anything of it leaves; return the line."""
        from share_client.training import total_epsilon

        known = [*self._declarations(task), declared]
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "privacy": declaration_to_text(declared),
            "epsilon": total_epsilon(known),
            "delta": min(one.delta for one in known),
        }
        make_private_directory(self._directory / task)
        append_line(self._path(task), json.dumps(line))
        return line

    def _declarations(self, task: str) -> list[Declaration]:
        found = (declaration_from_text(line["privacy"]) for line in read_json_lines(self._path(task)))
        return [declared for declared in found if declared is not None]

    def _path(self, task: str) -> Path:
        return self._directory / task / "spent.jsonl"
