"""Waiting before the next attempt: twice as long each time, up to a limit, with some noise.

A hub that has too much to do says when it wants to be asked again; that hint is the least that is waited.
"""

from __future__ import annotations

import random
import threading

from share_core.errors import FedshareError, OverloadError

LONGEST_HINT_S = 60.0
"""The most that a hub's hint is believed: a wrong one must not silence a client for a day."""


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

    def next_wait(self, reason: FedshareError | None = None) -> float:
        """Return the next waiting time in seconds.

        It lies between half of and the whole current step. If ``reason`` is an OverloadError it is also at least the
        hub's hint and at most half as long again, so that those who were sent away together do not return together;
        hints count up to :data:`LONGEST_HINT_S`.
        """
        step = self._next
        self._next = min(self._longest, 2 * step)
        own = step * (0.5 + 0.5 * self._random.random())
        if not isinstance(reason, OverloadError) or reason.retry_after_ms <= 0:
            return own
        hinted = reason.retry_after_ms / 1000 * (1.0 + 0.5 * self._random.random())
        return min(LONGEST_HINT_S, max(own, hinted))

    def wait(self, stop: threading.Event, reason: FedshareError | None = None) -> bool:
        """Sleep for the next waiting time; return False at once when ``stop`` is set."""
        return not stop.wait(self.next_wait(reason))
