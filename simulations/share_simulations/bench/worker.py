"""Load processes: children that wait for commands as JSON lines and answer each with one JSON line.

The parent makes the job file, starts ``python -m MODULE JOB`` and talks over the child's standard streams; what the
child says beside that goes to its log. A child ends when its input ends, and on Linux also when its parent dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from share_core.durable import PRIVATE, write_atomic
from share_core.lifeline import tied
from share_simulations.processes import Child

_READY_S = 120.0
_END_S = 15.0


class Worker:
    """The parent's side of one load process."""

    def __init__(self, name: str, module: str, job: dict[str, Any], folder: Path) -> None:
        """Start it. ``job`` may hold private keys: its file is readable for the owner only."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        write_atomic(path, json.dumps(job).encode(), PRIVATE)
        log = folder / f"{name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                tied([sys.executable, "-m", module, str(path)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                process_group=0,  # Ctrl-C is for the parent, which ends the children in order
            )
        self._child = Child(name, self._process, log)
        self._pending = b""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    def send(self, command: dict[str, Any]) -> None:
        """Hand over one command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._child.failure("takes no commands any more") from None

    def receive(self, timeout_s: float = _READY_S) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            ProcessFailedError: it ended, or said nothing in time; shows the end of its log.
        """
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise self._child.failure(f"said nothing for {timeout_s:g} s")
                piece = os.read(self._process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise self._child.failure("ended before it had answered")
                self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, command: dict[str, Any], timeout_s: float = _READY_S) -> dict[str, Any]:
        """Hand over one command and return its answer."""
        self.send(command)
        return self.receive(timeout_s)

    def close(self) -> None:
        """End the process: close its input, then kill it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._child.kill_group()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def kill(self) -> None:
        """End the process at once."""
        self._child.kill_group()
        self.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()


def ask_all(workers: Iterable[Worker], command: dict[str, Any], timeout_s: float = _READY_S) -> list[dict[str, Any]]:
    """Hand the same command to several load processes at once and return their answers."""
    workers = list(workers)
    for worker in workers:
        worker.send(command)
    return [worker.receive(timeout_s) for worker in workers]


Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


async def serve_commands(handle: Handler, ready: dict[str, Any]) -> None:
    """Be the child: say ``ready``, then answer commands one after the other until the input ends."""
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    _say(ready)
    while line := await reader.readline():
        _say(await handle(json.loads(line)))


def read_job() -> dict[str, Any]:
    """Return the job that this process was started with, and remove its file."""
    path = Path(sys.argv[1])
    job: dict[str, Any] = json.loads(path.read_bytes())
    path.unlink()
    return job


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
