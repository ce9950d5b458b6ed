"""Trainings that did not end well: which are tried again, and when.

A mistake in data or settings is a refusal: another attempt is made when one of them has changed. What may pass (memory
that something else takes, a disk that is away, a package that is missing) is tried again, after waits that double. Any
other failure is a fault of the code that trains; after some tries in a row it counts as a refusal. Whichever it is, the
other tasks go on, unless the device itself is in a state from which only a new process gets out.
"""

from __future__ import annotations

import time

import torch

from share_client.faults import in_words
from share_client.records import BrokenOff, Records
from share_client.session_log import SessionLog
from share_client.trainer import LocalTask
from share_core.errors import ConfigError, FedshareError

AGAIN_S = 60.0
"""Seconds until a training that broke off is tried again; each time in a row twice as long."""

LONGEST_S = 3600.0
"""Most seconds until then."""

MOST_FAILURES = 5
"""How often in a row an attempt may fail, other than in passing, before it counts as refused."""

_NO_MEMORY = "DefaultCPUAllocator"
"""PyTorch has no class of its own for a processor without memory."""


def reason_of(error: Exception) -> str:
    """Return in words why the work on one task failed.

    Raises:
        Exception: ``error`` itself where it is about more than that task.
    """
    if is_about_more(error):
        raise error
    return _in_words(error)


def is_about_more(error: Exception) -> bool:
    """Whether an error is about the federation, or about a device that refuses all further work of this process."""
    if isinstance(error, FedshareError):
        return not isinstance(error, ConfigError)
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def _in_words(error: Exception) -> str:
    remedy = "; raise accumulate, or set checkpointing = true" if isinstance(error, torch.OutOfMemoryError) else ""
    return f"{in_words(error)}{remedy}"


def may_pass(error: BaseException | None) -> bool:
    """Whether a failure says nothing about the task: no memory, no package, or a file that the system did not give."""
    if error is None:
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError | ImportError) or _NO_MEMORY in str(error):
        return True
    # One without a number is a library's way to say that a file is broken.
    return (isinstance(error, OSError) and error.errno is not None) or may_pass(error.__cause__)


class Attempts:
    """Which trainings a session leaves alone for now, and which for good."""

    def __init__(self, records: Records, log: SessionLog) -> None:
        self._records = records
        self._log = log

    def is_open(self, task: LocalTask) -> bool:
        """Whether a task has yet to be trained, and may be now."""
        record = self._records.get(task.name)
        if not record.wants(task.content_hash, task.attempt):
            return False
        wait = record.broken_off.not_before - time.time() if record.broken_off.attempt == task.attempt else 0.0
        return not 0.0 < wait <= LONGEST_S  # more than that is of a clock that was wrong

    def failed(self, task: LocalTask, error: Exception) -> None:
        """Write down that a training failed; it is over for good, or put off.

        Raises:
            Exception: ``error`` itself where it is about more than this task.
        """
        if isinstance(error, FedshareError) and is_about_more(error):
            raise error
        reason, passing = _in_words(error), may_pass(error)
        known = self._records.get(task.name).broken_off
        times = known.times + 1 if known.attempt == task.attempt else 1
        if isinstance(error, ConfigError) and not passing:
            self._refuse(task, reason)
        elif times >= MOST_FAILURES and not passing:
            self._refuse(task, f"{reason} ({times} times in a row)")
        else:
            wait = min(AGAIN_S * 2.0 ** (times - 1), LONGEST_S)
            self._records.broke_off(task.name, BrokenOff(task.attempt, times, time.time() + wait, reason))
            self._log.write("broken_off", task=task.name, reason=reason, again_in_s=wait)
        if is_about_more(error):  # counted against the task that met it, lest it ends every session
            raise error

    def _refuse(self, task: LocalTask, reason: str) -> None:
        self._records.refused(task.name, task.attempt, reason)
        self._log.write("refused", task=task.name, reason=reason)
