"""Progress of a campaign on standard error: one line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.status import Status

from share_simulations.progress import progress_console

_EVERY_S = 10.0


class Meter:
    """Shows how far a campaign is. Use it as a context manager."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = progress_console()
        self._status: Status | None = None
        self._said = -_EVERY_S

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status = self._console.status(self._title)
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, text: str) -> None:
        """Show the newest state."""
        if self._status is not None:
            self._status.update(f"{self._title}: {text}")
        elif time.monotonic() - self._said >= _EVERY_S:
            self._said = time.monotonic()
            self.note(text)

    def note(self, text: str) -> None:
        """Say something that stays."""
        self._console.print(f"{self._title}: {text}", highlight=False, markup=False, soft_wrap=True)
