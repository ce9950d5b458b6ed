"""Lives of one client in the crash lab: the real session with real training, killed (SIGKILL) at a chosen moment.

A bench is a process of its own that has imported everything, loaded the backbone and read the data, and never spoken
gRPC: each life is forked from it under the tracer of :mod:`share_simulations.chaos.ptrace`, so it costs no start. A
life tells what it has done by writing to a marker descriptor; what was told has happened before the kill.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_client import refits, session
from share_client.link import HubLink
from share_client.outbox import Entry, Outbox
from share_client.trainer import BackboneTrainer, LocalTask, Refit, Step, Trained
from share_client.uploading import Submission
from share_core.errors import ConfigError, FedshareError
from share_core.lifeline import arm
from share_core.types import SharedHead, Space
from share_proto.v1 import hub_pb2
from share_simulations.chaos.client_bugs import BUGS
from share_simulations.chaos.ptrace import GO, KILL, Call, Handler, Verdict, trace

OPTIONS = session.SessionOptions(linger_s=0.15, poll_s=0.02, cache_every=2, lock_s=10.0)
_LIMIT_S = 300

PLACES: Mapping[str, str] = {"any": "", "outbox": r"/(outbox|identity)/", "records": r"/tasks/"}
"""Pattern of the paths whose changes are counted, by the place at which a life is killed."""


@dataclass(frozen=True)
class Kill:
    """When a life is ended: before a file-changing call of one place, or after some time."""

    place: str = "any"
    """A key of :data:`PLACES`."""
    call: int = 0
    """Number of the call in that place before which the process dies, from 1; 0: none."""
    after_s: float = 0.0
    """Seconds after which it dies, wherever it is; 0: never."""


@dataclass(frozen=True)
class Order:
    """One life that the bench is asked for."""

    root: Path
    """The client directory, enrolled."""
    kill: Kill
    """How it ends; without any moment it ends when nothing is left to do."""
    bug: str = ""
    """A key of :data:`~.client_bugs.BUGS`, or nothing."""


@dataclass
class Life:
    """What one life has told, and how it ended."""

    marks: list[str] = field(default_factory=list)
    """``trained TASK``, ``put ID TASK``, ``sent ID SHA256``, ``receipt ID``, in order."""
    calls: dict[str, int] = field(default_factory=dict)
    """File-changing calls by place."""
    killed: bool = False
    """Whether SIGKILL ended it."""
    code: int = 0
    """Exit code, if it was not killed."""
    last: str = ""
    """The call before which it died."""
    words: str = ""
    """The end of what it wrote to stderr, if it failed."""


class Bench:
    """A process that leads lives of clients, one at a time."""

    def __init__(self, tasks_file: Path, log: Path) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._pipe, other = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(other, os.getpid(), tasks_file, log), daemon=True)
        self._process.start()
        other.close()

    def live(self, order: Order) -> Life:
        """Lead one life to its end.

        Raises:
            ConfigError: the bench has ended; its own message is on standard error.
        """
        try:
            self._pipe.send(order)
            life = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ConfigError("the bench of the client campaign has ended: see above") from error
        if isinstance(life, str):
            raise ConfigError(life)
        assert isinstance(life, Life)
        return life

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def open_bench(tasks_file: Path, log: Path) -> Iterator[Bench]:
    """Start a bench for the tasks of one file; everything it writes to stderr goes to ``log``."""
    bench = Bench(tasks_file, log)
    try:
        yield bench
    finally:
        bench.close()


class _Watcher(Handler):
    """Counts calls by place, kills at the chosen one, and keeps what the life tells."""

    def __init__(self, kill: Kill) -> None:
        self._kill = kill
        self._patterns = {place: re.compile(pattern) for place, pattern in PLACES.items()}
        self.life = Life(calls=dict.fromkeys(PLACES, 0))

    def entered(self, call: Call) -> Verdict:
        """Count, and kill at the chosen one."""
        hit = False
        for place, pattern in self._patterns.items():
            if pattern.search(call.path) or pattern.search(call.target):
                self.life.calls[place] += 1
                hit = hit or (place == self._kill.place and self.life.calls[place] == self._kill.call)
        if hit:
            self.life.last = f"{call.name} {Path(call.target or call.path).name}"
        return KILL if hit else GO

    def marked(self, text: bytes) -> None:
        """Keep what was told."""
        self.life.marks += text.decode().splitlines()


def _serve(pipe: Connection, parent: int, tasks_file: Path, log: Path) -> None:
    """Be the bench: answer orders until the pipe is closed."""
    arm(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the campaign decides when this ends
    torch.set_num_threads(1)
    try:
        trainer = _TellingTrainer(tasks_file)
        importlib.import_module("torch._dynamo")  # the first optimiser of a process does, and it takes seconds
        trainer.weights()
        for task in trainer.tasks():
            trainer.rows(task)
        while True:
            pipe.send(_lead(pipe.recv(), trainer, tasks_file, log))
    except EOFError:
        return
    except FedshareError as error:
        pipe.send(f"the bench of the client campaign: {error}")


def _lead(order: Order, trainer: _TellingTrainer, tasks_file: Path, log: Path) -> Life:
    marker = os.open(os.devnull, os.O_WRONLY)
    watcher = _Watcher(order.kill)

    def main() -> int:
        return _live(order, trainer, tasks_file, lambda text: _tell(marker, text))

    log.write_bytes(b"")
    try:
        ending = trace(main, order.root.resolve(), watcher, marker=marker, log=log, limit_s=_LIMIT_S)
    finally:
        os.close(marker)
    life = watcher.life
    life.killed = ending.signal == signal.SIGKILL
    life.code = ending.code if not ending.signal or life.killed else -ending.signal
    if not life.killed and life.code != 0:
        life.words = log.read_text(errors="replace")[-600:]
    return life


def _tell(marker: int, text: str) -> None:
    os.write(marker, f"{text}\n".encode())


def _live(order: Order, trainer: _TellingTrainer, tasks_file: Path, say: Callable[[str], None]) -> int:
    """Be the client: one session from its start until nothing is left to do."""
    torch.set_num_threads(1)
    module: Any = session
    module.HubLink, module.Outbox = _telling_link(say), _telling_outbox(say)
    # Few rows decide nothing: here every refit that is due is sent, so that kills hit those as well.
    deciding: Any = refits
    deciding.is_better = lambda found: found.trained is not None
    if order.bug:
        BUGS[order.bug].plant()
    if order.kill.after_s:
        dying = threading.Timer(order.kill.after_s, os.kill, (os.getpid(), signal.SIGKILL))
        dying.daemon = True
        dying.start()
    trainer.say = say
    counters = session.run_session(order.root, tasks_file, trainer=trainer, options=OPTIONS)
    return 0 if counters.idle else 4


def _telling_link(say: Callable[[str], None]) -> type[HubLink]:
    class TellingLink(HubLink):
        """Tells what leaves, and what was acknowledged."""

        def submit(self, submission: Submission, payload: bytes, offset: int = 0) -> hub_pb2.SubmitResponse:
            say(f"sent {submission.update_id} {submission.payload_sha256}")
            answer = super().submit(submission, payload, offset)
            say(f"receipt {submission.update_id}")
            return answer

    return TellingLink


def _telling_outbox(say: Callable[[str], None]) -> type[Outbox]:
    class TellingOutbox(Outbox):
        """Tells what is durable."""

        def put(self, *arguments: Any, **named: Any) -> Entry:
            entry = super().put(*arguments, **named)
            say(f"put {entry.update_id} {entry.training.task}")
            return entry

    return TellingOutbox


class _TellingTrainer(BackboneTrainer):
    """Tells when a training is over; the backbone and the data were loaded before the fork."""

    say: Callable[[str], None]

    def train(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        progress: Callable[[Step], None],
        shared: SharedHead | None = None,
    ) -> Trained:
        """Train, and tell."""
        trained = super().train(task, space, task_id, progress, shared)
        self.say(f"trained {task.name}")
        return trained

    def refit(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        head: Mapping[str, Tensor],
        before: float | None,
        progress: Callable[[Step], None],
    ) -> Refit:
        """Refit whatever the gradient says."""
        return super().refit(task, space, task_id, head, None, progress)
