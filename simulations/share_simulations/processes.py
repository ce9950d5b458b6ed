"""Child processes of a simulated federation: a log file each, ended together, none left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from share_core.errors import ConfigError, FedshareError
from share_core.lifeline import become_subreaper, children, kill_adopted, tied

TAIL_LINES = 25
"""Lines of a failing process's log that an error shows."""


class ProcessFailedError(FedshareError):
    """A process of the federation ended or did not do its part in time."""


class Child:
    """One running process with its log."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return how the process ended; None while it runs. Negative: the signal that killed it."""
        return self._process.poll()

    def tail(self) -> str:
        """Return the last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def failure(self, what: str) -> ProcessFailedError:
        """Return an error that says what happened and shows the end of the log."""
        return ProcessFailedError(f"{self.name}: {what}; the last lines of {self.log}:\n{self.tail()}")

    def check(self) -> None:
        """Raise ProcessFailedError if the process has ended."""
        code = self.exit_code()
        if code is not None:
            raise self.failure(f"ended with exit code {code} before the federation was done")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill_group(self) -> None:
        """Kill whatever still runs in the process's group and reap the process."""
        with contextlib.suppress(ProcessLookupError):  # all of them had ended
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Processes:
    """A set of children that ends with the ``with`` block, the one started first last.

    Each child leads a process group of its own, so that Ctrl-C reaches the simulation only and the children
    are ended in order. On Linux they also die with this process, whatever kills it.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str] | None = None, patience_s: float = 20.0) -> None:
        self._logs = logs
        self._environment = {**os.environ, **(environment or {})}
        self._patience_s = patience_s
        self._children: list[Child] = []
        self._before: frozenset[int] = frozenset()

    def __enter__(self) -> Processes:
        self._logs.mkdir(parents=True, exist_ok=True)
        # Flower's workers have sessions of their own; as their reaper we find them when their parent is gone.
        become_subreaper()
        self._before = frozenset(children())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        previous = _ignore_interrupts()
        try:
            self.stop()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(self, name: str, command: Sequence[str], stdin: str | None = None) -> Child:
        """Start a command of this installation in the background; its output goes to ``<logs>/<name>.log``.

        ``stdin`` is handed over as standard input: secrets belong there, not on a command line.
        """
        log = self._logs / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                tied([installed(command[0]), *command[1:]]),
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                process_group=0,
            )
        child = Child(name, process, log)
        self._children.append(child)
        if stdin is not None and process.stdin is not None:
            process.stdin.write(stdin.encode())
            process.stdin.close()
        return child

    def call(self, name: str, command: Sequence[str], timeout_s: float = 120.0) -> str:
        """Run a command of this installation to its end and return its standard output.

        Raises:
            ProcessFailedError: it failed or took too long; shows what it printed.
        """
        full = [installed(command[0]), *command[1:]]
        try:
            done = subprocess.run(
                full, capture_output=True, text=True, timeout=timeout_s, env=self._environment, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ProcessFailedError(f"{name}: {' '.join(command)} took longer than {timeout_s:g} s") from error
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise ProcessFailedError(f"{name}: {' '.join(command)} ended with exit code {done.returncode}: {said}")
        return done.stdout

    def check(self) -> None:
        """Raise ProcessFailedError if any child has ended by itself."""
        for child in self._children:
            child.check()

    def stop(self) -> None:
        """End all children, the first one last: SIGTERM, then SIGKILL for the group, then their orphans."""
        first, others = self._children[:1], self._children[1:]
        self._children.clear()
        # The clients take their leave from a server that still answers.
        for wave in (others, first):
            self._end(wave)
        kill_adopted(self._before)

    def _end(self, wave: Sequence[Child]) -> None:
        for child in wave:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + self._patience_s
        for child in wave:
            while child.exit_code() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            child.kill_group()


def installed(command: str) -> str:
    """Return the path of a console script of the environment that this Python belongs to.

    Raises:
        ConfigError: it is not there.
    """
    path = Path(sys.executable).parent / command
    if not path.is_file():
        raise ConfigError(f"expected the command {command} in {path.parent}, but it is not there: install fedshare")
    return str(path)


def _ignore_interrupts() -> dict[signal.Signals, signal._HANDLER]:
    """Let a second Ctrl-C not interrupt the clearing up; it takes some seconds at most."""
    return {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
