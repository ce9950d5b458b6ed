"""The one Flower run that dispatches leases: submitted, watched, submitted again when its ServerApp is gone."""

from __future__ import annotations

import fcntl
import time
from contextlib import suppress
from pathlib import Path

from share_core.errors import UnavailableError
from share_server.fleet.files import FleetFiles
from share_server.fleet.flwr_cli import FlowerCommands
from share_server.hub import log

_START_LIMIT = 45.0
"""Seconds from the submission until the ServerApp must be seen."""

_PAUSES = (0.0, 2.0, 5.0, 10.0)
"""Seconds before the next submission after as many failures in a row."""


class FlowerRun:
    """Step it only while the SuperLink is healthy; tell it when the SuperLink has died."""

    def __init__(self, files: FleetFiles, commands: FlowerCommands) -> None:
        self.run_id: str | None = None
        self.dispatching = False
        """True while its ServerApp is alive."""
        self._files = files
        self._commands = commands
        # A database from an earlier life may hold runs that Flower still takes for running.
        self._others_alive = files.database.exists()
        self._others: list[str] | None = None
        self._submitted_at = 0.0
        self._failures = 0
        self._not_before = 0.0

    def lost(self) -> None:
        """Forget the run because the SuperLink that carried it has died."""
        self.run_id = None
        self.dispatching = False
        self._others_alive, self._others = True, None

    def step(self) -> None:
        """Submit the run if there is none, stop all others, and see whether its ServerApp lives."""
        now = time.monotonic()
        if self.run_id is None:
            if now >= self._not_before:
                self._submit()
            return
        alive = server_app_run(self._files.server_app) == self.run_id
        if alive and not self.dispatching:
            self.dispatching, self._failures = True, 0
            log.info("dispatching", run_id=self.run_id, seconds=round(now - self._submitted_at, 1))
        elif not alive and (self.dispatching or now - self._submitted_at > _START_LIMIT):
            log.warning("run lost its ServerApp, submitting anew", run_id=self.run_id, seen=self.dispatching)
            self._failed(now)
        elif self._others_alive and now >= self._not_before:
            # After submitting and one at a time: each command takes seconds and nothing waits for these.
            self._stop_one_other()

    def _submit(self) -> None:
        try:
            self.run_id = self._commands.submit()
        except UnavailableError as error:
            log.warning("run not submitted", reason=str(error))
            self._failed(time.monotonic())
            return
        self._submitted_at = time.monotonic()
        log.info("submitted", run_id=self.run_id)

    def _stop_one_other(self) -> None:
        """Run one command towards stopping every run but ours: ask for them, or stop the next one."""
        try:
            if self._others is None:
                self._others = [run_id for run_id in self._commands.unfinished_runs() if run_id != self.run_id]
            elif self._others:
                self._commands.stop(self._others[-1])
                log.info("stopped an older run", run_id=self._others.pop())
            self._others_alive = self._others != []
        except UnavailableError as error:
            log.warning("older runs not stopped", reason=str(error))
            self._others = None
            self._not_before = time.monotonic() + _PAUSES[1]

    def _failed(self, now: float) -> None:
        self.lost()
        self._not_before = now + _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self._failures += 1


def server_app_run(lock: Path) -> str | None:
    """Return the run id of the ServerApp that holds ``lock``, or None if no living process does.

    The kernel lets go of the lock when its holder dies, however it dies, so this needs no heartbeat.
    """
    with suppress(FileNotFoundError), lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            words = file.read(100).decode("ascii", "replace").split()
            return words[0] if words else None
    return None
