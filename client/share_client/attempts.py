"""Trainings that did not end well: which are tried again, and when.

A mistake in data or settings is a refusal: another attempt is made when one of them has changed. What may pass (memory
that something else takes, a disk that is away) is tried again later and as often as it takes. Any other failure is a
fault of the code that trains, perhaps of a kind of the owner's own: after some tries in a row it counts as a refusal.
Whichever it is, the other tasks go on.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import torch

from share_client.records import MOST_RETRAININGS, Records
from share_client.session_log import SessionLog
from share_client.trainer import LocalTask
from share_core.errors import ConfigError, FedshareError

AGAIN_S = 60.0
"""Seconds until a training that broke off is tried again in the same session."""


def reason_of(error: Exception) -> str:
    """Return in words why the work on one task failed.

    Raises:
        FedshareError: ``error`` itself where it is about more than that task.
    """
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, FedshareError):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    remedy = "; raise accumulate, or set checkpointing = true" if isinstance(error, torch.OutOfMemoryError) else ""
    return f"{type(error).__name__}: {error}{where}{remedy}"


def may_pass(error: BaseException | None) -> bool:
    """Whether a failure says nothing about the task: no memory, or a file that the system did not give."""
    if error is None:
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # One without a number is a library's way to say that a file is broken.
    return (isinstance(error, OSError) and error.errno is not None) or may_pass(error.__cause__)


class Attempts:
    """Which trainings a session leaves alone for now, and which for good."""

    def __init__(self, records: Records, log: SessionLog) -> None:
        self._records = records
        self._log = log
        self._not_before: dict[str, float] = {}

    def is_open(self, task: LocalTask) -> bool:
        """Whether a task has yet to be trained, and may be now."""
        wanted = self._records.get(task.name).wants(task.content_hash, task.attempt)
        return wanted and time.monotonic() >= self._not_before.get(task.attempt, 0.0)

    def failed(self, task: LocalTask, error: Exception) -> None:
        """Write down that a training failed; it is over for good, or put off.

        Raises:
            FedshareError: ``error`` itself where it is about more than this task.
        """
        reason = reason_of(error)
        passing = may_pass(error)
        if not passing and isinstance(error, ConfigError):
            self._refuse(task, reason)
        elif passing or self._records.retrain(task.name):
            self._not_before[task.attempt] = time.monotonic() + AGAIN_S
            self._log.write("broken_off", task=task.name, reason=reason)
        else:
            self._refuse(task, f"{reason} ({MOST_RETRAININGS} times in a row)")

    def _refuse(self, task: LocalTask, reason: str) -> None:
        self._records.refused(task.name, task.attempt, reason)
        self._log.write("refused", task=task.name, reason=reason)
