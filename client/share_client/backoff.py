"""Waiting before the next attempt: twice as long each time, up to a limit, with some noise."""

from __future__ import annotations

import random
import threading


class Backoff:
    """The waiting times of one series of attempts.

    The noise keeps a thousand clients from returning to a restarted hub in the same instant.
    """

    def __init__(self, first: float = 0.2, longest: float = 10.0, seed: int | None = None) -> None:
        self._first = first
        self._longest = longest
        self._next = first
        self._random = random.Random(seed)

    def reset(self) -> None:
        """Begin a new series: the last attempt succeeded."""
        self._next = self._first

    def next_wait(self) -> float:
        """Return the next waiting time in seconds, between half of and the whole current step."""
        step = self._next
        self._next = min(self._longest, 2 * step)
        return step * (0.5 + 0.5 * self._random.random())

    def wait(self, stop: threading.Event) -> bool:
        """Sleep for the next waiting time; return False at once when ``stop`` is set."""
        return not stop.wait(self.next_wait())
