"""One client of the scaled day: the real session with a trainer that sleeps instead of training.

The process is killed at any moment and started again on the same directory. What its link sent and was told is written
into a ledger, line by line, before and after each call: the checks at the end of the day compare it with the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from share_client import session
from share_client.enrol import enrol
from share_client.link import HubLink
from share_client.member import ClientLayout, load_credentials, load_member, save_member
from share_client.outbox import list_outbox
from share_client.trainer import LocalTask, Measured, Refit, Step, Trained
from share_client.uploading import Submission
from share_core.errors import ConfigError, DigestError, FedshareError, TokenError, UnavailableError
from share_core.types import Adapter, SharedHead, Space
from share_proto.v1 import hub_pb2
from share_simulations.chaos.load import toy_space, toy_update, toy_weights

EXIT_TOKEN = 3
"""The token was used up by a life that was killed before it had its certificate: another one is needed."""

EXIT_FAILED = 4
"""The client met something that it must not meet; the end of its log says what."""

_LOOK_S = 0.05


@dataclass(frozen=True)
class ClientPlan:
    """One client; the same for each of its lives."""

    root: Path
    """Its directory."""
    board: Path
    """A file with the newest version, written by the campaign."""
    address: str
    """The hub as this client reaches it: the proxy."""
    began: float
    """When the day began, in seconds since 1970."""
    pace_s: float
    """Seconds until the data of a task changes."""
    think_s: float
    """Longest usual training."""
    stale: float
    """Share of the trainings that go on until their version is no longer kept."""
    stale_versions: int
    """Versions after which that is so."""
    tasks: int
    """Tasks of this client."""
    seed: int
    """Seed of everything."""

    @property
    def leave(self) -> Path:
        """A file whose presence means: begin nothing new, bring the outbox to its end, and go."""
        return self.root.parent / f"{self.root.name}.leave"

    @property
    def ledger(self) -> Path:
        """What was sent and told."""
        return self.root.parent / f"{self.root.name}.ledger"

    @property
    def log(self) -> Path:
        """Standard error of all lives."""
        return self.root.parent / f"{self.root.name}.log"


class Ledger:
    """Appends JSON lines; each is in the kernel's hands before the call returns, so that SIGKILL loses none."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, **line: str | int | bool) -> None:
        """Append one line."""
        os.write(self._handle, (json.dumps(line) + "\n").encode())


class LedgerLink(HubLink):
    """The client's link, with a ledger beside it."""

    ledger: Ledger

    def submit(self, submission: Submission, payload: bytes, offset: int = 0) -> hub_pb2.SubmitResponse:
        """Note what leaves, send it, and note the receipt."""
        self.ledger.write(event="sent", update_id=submission.update_id, sha256=submission.payload_sha256)
        answer = super().submit(submission, payload, offset)
        self._note(answer)
        return answer

    def get_upload(self, update_id: str) -> hub_pb2.GetUploadResponse:
        """Ask, and note a receipt in the answer."""
        answer = super().get_upload(update_id)
        if answer.HasField("receipt"):
            self._note(answer.receipt)
        return answer

    def _note(self, receipt: hub_pb2.SubmitResponse) -> None:
        self.ledger.write(
            event="receipt",
            update_id=receipt.update_id,
            ingest_seq=receipt.ingest_seq,
            entry_hash=receipt.entry_hash,
            duplicate=receipt.duplicate,
        )


class SleepingTrainer:
    """Data that changes all day; training is sleep and random numbers."""

    def __init__(self, plan: ClientPlan) -> None:
        self._plan = plan
        self._random = random.Random(f"{plan.seed} {time.time_ns()}")  # another life draws other moments
        self._spec = toy_space()

    def weights(self) -> Mapping[str, Tensor]:
        """Return the toy backbone."""
        return toy_weights()

    def tasks(self) -> Sequence[LocalTask]:
        """Return every task with the state its data has now; from the moment of leaving on it stays as it is."""
        leave = self._plan.leave
        now = leave.stat().st_mtime if leave.exists() else time.time()
        found = []
        for number in range(self._plan.tasks):
            # One after the other: all tasks of a client never change together.
            edition = int((now - self._plan.began) / self._plan.pace_s + number / self._plan.tasks)
            content = f"{self._plan.seed} {number} {edition}"
            found.append(LocalTask(f"t{number}", hashlib.sha256(content.encode()).hexdigest()))
        return found

    def rows(self, task: LocalTask) -> int:
        """Return some number."""
        return 100

    def train(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        progress: Callable[[Step], None],
        shared: SharedHead | None = None,
    ) -> Trained:
        """Sleep, sometimes until the hub has forgotten ``space``, and return a random update in it."""
        begin = time.monotonic()
        if self._random.random() < self._plan.stale:
            goal = space.version + self._plan.stale_versions
            while self._newest() < goal and not self._plan.leave.exists():
                time.sleep(_LOOK_S)
        else:
            time.sleep(self._random.uniform(0, self._plan.think_s))
        seed = int(task.content_hash[:8], 16)
        update = toy_update(self._spec, space, seed)
        head = {"seed": torch.tensor([float(seed % 1000)])}
        return Trained(update, head, loss=0.5, steps=1, seconds=time.monotonic() - begin, rows=100)

    def refit(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        head: Mapping[str, Tensor],
        before: float | None,
        progress: Callable[[Step], None],
    ) -> Refit:
        """Never: this trainer has nothing to refit."""
        return Refit(captured=0.0)

    def evaluate(self, task: LocalTask, adapter: Adapter, head: Mapping[str, Tensor]) -> Measured:
        """Return some number; the private head must be the one of this data."""
        if float(head["seed"]) != int(task.content_hash[:8], 16) % 1000:
            raise ConfigError(f"{task.name}: the private head belongs to other data than the merged core")
        return Measured("accuracy", 0.5, 50)

    def _newest(self) -> int:
        try:
            return int(self._plan.board.read_text())
        except (OSError, ValueError):
            return 0


def run_client(plan: ClientPlan, token: str) -> None:
    """Be the process: enrol if that has not been done, then work until told to leave."""
    log = os.open(plan.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    LedgerLink.ledger = Ledger(plan.ledger)
    session.HubLink = LedgerLink  # type: ignore[attr-defined]
    try:
        _join(plan, token)
        over = threading.Event()
        doubler = threading.Thread(target=_send_twice, args=(plan, over), daemon=True)
        doubler.start()
        _work(plan)
        over.set()
        doubler.join()
    except TokenError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_TOKEN)
    except FedshareError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _join(plan: ClientPlan, token: str) -> None:
    layout = ClientLayout(plan.root)
    while not layout.member.exists():
        try:
            enrol(token, layout, datetime.now(UTC))
        except UnavailableError:
            time.sleep(0.2)
    member = load_member(layout)
    if member.hub_address != plan.address:
        save_member(layout, replace(member, hub_address=plan.address))


def _work(plan: ClientPlan) -> None:
    """Run one session after the other; the last one begins after the order to leave and ends with nothing left."""
    options = session.SessionOptions(linger_s=1.0, poll_s=0.1, cache_every=5)
    trainer = SleepingTrainer(plan)
    while True:
        leaving = plan.leave.exists()
        try:
            counters = session.run_session(plan.root, plan.root / "tasks.toml", trainer=trainer, options=options)
        except UnavailableError:
            time.sleep(0.2)
            continue
        if leaving and counters.idle:
            return


def _send_twice(plan: ClientPlan, over: threading.Event) -> None:
    """Now and then send what is in the outbox beside the session, as a process does that thinks the first one hangs."""
    draw = random.Random(plan.seed + 1)
    layout = ClientLayout(plan.root)
    with LedgerLink(plan.address, load_credentials(layout, datetime.now(UTC)), deadline=10.0) as link:
        while not over.wait(draw.uniform(0.2, 1.5)):
            # An entry may be merged, expressed anew or removed at any moment, and the hub may be away.
            with contextlib.suppress(OSError, ConfigError, DigestError, FedshareError):
                waiting, _ = list_outbox(layout.outbox)
                for entry in [entry for entry in waiting if entry.submission.signature][:1]:
                    link.submit(entry.submission, entry.read_payload())
