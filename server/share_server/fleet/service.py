"""One supervised process: started, watched, started again with growing pauses."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from share_core.lifeline import tied
from share_server.hub import log

_PAUSES = (0.2, 1.0, 2.0, 4.0, 8.0)
"""Seconds before the first, second, ... restart in a row; the last one repeats."""

_STEADY_SECONDS = 30.0
"""After so long in good health a death counts as the first one again."""

_TAIL_BYTES = 2000


class Service:
    """A process that should always run. All times are monotonic seconds.

    ``launch`` returns the command line and the environment (None: inherit) for each start; ``probe`` tells whether
    the process does its work; ``start_limit`` is how long it may take until it does.
    """

    def __init__(
        self,
        name: str,
        log_file: Path,
        launch: Callable[[], tuple[Sequence[str], Mapping[str, str] | None]],
        probe: Callable[[], bool],
        start_limit: float,
    ) -> None:
        self.name = name
        self.healthy = False
        self.was_healthy = False
        """True once it has been healthy since the supervisor started."""
        self.deaths = 0
        """Deaths in a row without a steady time between them."""
        self.exit_code: int | None = None
        """How it ended last."""
        self._log_file = log_file
        self._launch = launch
        self._probe = probe
        self._start_limit = start_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._next_start = 0.0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None else None

    def step(self) -> bool:
        """Start it if it is due, look whether it lives and works. Return True in the step that finds it dead."""
        now = time.monotonic()
        self._trim()
        if self._process is None:
            if now >= self._next_start:
                self._start(now)
            return False
        code = self._process.poll()
        if code is not None:
            self._ended(code, now)
            return True
        if not self.healthy:
            if self._probe():
                self.healthy = self.was_healthy = True
                log.info(
                    "healthy", service=self.name, pid=self.pid, seconds=round(time.monotonic() - self._started_at, 1)
                )
            elif now - self._started_at > self._start_limit:
                log.warning("not healthy in time, starting anew", service=self.name, pid=self.pid)
                self._process.kill()
        return False

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self, patience: float) -> None:
        """Wait until it has ended, and kill it after ``patience`` seconds."""
        if self._process is None:
            return
        try:
            self._process.wait(max(patience, 0.0))
        except subprocess.TimeoutExpired:
            log.warning("did not stop in time, killed", service=self.name, pid=self._process.pid)
            self._process.kill()
            self._process.wait()
        self._process = None
        self.healthy = False

    def tail(self) -> str:
        """Return the end of its log."""
        try:
            return self._log_file.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def _trim(self) -> None:
        """Put aside what a process that does not look after its own log has written, as Flower's do not.

        The process keeps its file, which it appends to: what it writes between the copy and the cut is lost. Ours put
        their logs aside themselves, long before they are so large.
        """
        with contextlib.suppress(OSError):
            if self._log_file.stat().st_size > 2 * log.FILE_BYTES:
                shutil.copyfile(self._log_file, self._log_file.with_name(f"{self._log_file.name}.1"))
                os.truncate(self._log_file, 0)

    def _start(self, now: float) -> None:
        command, environment = self._launch()
        with self._log_file.open("ab") as output:
            self._process = subprocess.Popen(
                tied(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the supervisor, which then stops everything in order
            )
        self._started_at = now
        log.info("started", service=self.name, pid=self.pid)

    def _ended(self, code: int, now: float) -> None:
        if self.healthy and now - self._started_at > _STEADY_SECONDS:
            self.deaths = 0
        self._next_start = now + _PAUSES[min(self.deaths, len(_PAUSES) - 1)]
        self.deaths += 1
        self.exit_code = code
        self._process = None
        self.healthy = False
        log.warning("ended", service=self.name, exit_code=code, again_in_s=round(self._next_start - now, 1))
