"""The client's own copy of the space: the newest version to train in, and every version in order to evaluate.

One thread applies what the hub sends; another reads. The reader walks the versions one by one at its own speed: what
arrived while it was training waits as deltas, which are small, not as whole spaces.
"""

from __future__ import annotations

import threading
from collections import deque

from share_core.errors import FedshareError
from share_core.space import advance
from share_core.types import Delta, Space


class View:
    """Thread-safe holder of the local space."""

    def __init__(self, space: Space) -> None:
        self._newest = space
        self._walked = space
        self._ahead: deque[Delta | Space] = deque()
        self._changed = threading.Condition()
        self._failure: FedshareError | None = None

    @property
    def newest(self) -> Space:
        """The newest version received."""
        with self._changed:
            return self._newest

    @property
    def walked(self) -> Space:
        """The version that :meth:`walk` returned last; at the beginning the one given."""
        return self._walked

    def apply(self, event: Delta | Space) -> None:
        """Take over the next version.

        Raises:
            VersionError: a delta that does not follow the newest version.
        """
        space = advance(self._newest, event) if isinstance(event, Delta) else event
        with self._changed:
            self._newest = space
            self._ahead.append(event)
            self._changed.notify_all()

    def walk(self, limit: int | None = None) -> Space | None:
        """Return the version after :attr:`walked`, in order; None if there is none, or none up to ``limit``.

        Versions that a snapshot jumped over do not exist here.
        """
        with self._changed:
            if not self._ahead or (limit is not None and self._ahead[0].version > limit):
                return None
            event = self._ahead.popleft()
            at_newest, newest = not self._ahead, self._newest
        if at_newest and not isinstance(event, Space):
            # The same tensors the other thread made: two copies of the newest space would be one too many.
            self._walked = newest if newest.version == event.version else advance(self._walked, event)
        else:
            self._walked = advance(self._walked, event) if isinstance(event, Delta) else event
        return self._walked

    def wait(self, seconds: float) -> None:
        """Return when there is a version to walk to, the feed failed, or ``seconds`` have passed."""
        with self._changed:
            if not self._ahead and self._failure is None:
                self._changed.wait(seconds)

    def fail(self, error: FedshareError) -> None:
        """Tell the reader that no further versions will come, and why."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what :meth:`fail` was given."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
