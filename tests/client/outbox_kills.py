"""Kill a process at every step of an update's life in the outbox and look at what is left.

Run as a script: ``outbox_kills.py DIRECTORY``. It forks once per step; the child is ended with SIGKILL there. The last
line printed is a JSON object: for the real outbox (``""``) and for each planted bug, the number of kill points and the
violations found.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from share_client import outbox as module
from share_client.member import Credentials
from share_client.outbox import Entry, Outbox, Training
from share_client.signing import SubmissionSigner, sign_submission
from share_client.uploading import Submission
from share_core.errors import FedshareError
from share_core.identity import Identity, make_authority, make_csr, new_private_key_pem, sign_csr

PAYLOAD, HEAD, ADAPTER = b"p" * 5000, b"h" * 300, b"a" * 700
SECOND = b"q" * 4000
NOW = datetime.now(UTC)
KEY, AUTHORITY = new_private_key_pem(), make_authority("test", NOW)
CREDENTIALS = Credentials(KEY, sign_csr(*AUTHORITY, make_csr(KEY), Identity("trainer", "org", "one"), NOW, 1), b"")
TRAINING = Training("task", "hash", base_version=0, loss=0.1, steps=1, seconds=1.0, rows=5)


def signer(box: Outbox, step: Callable[[str], None] = lambda name: None) -> SubmissionSigner:
    return SubmissionSigner(box._directory / "sequence.json", lambda: CREDENTIALS, step)


def send(box: Outbox, entry: Entry, say: Callable[[str], None], step: Callable[[str], None]) -> Entry:
    """Sign an entry unless it is signed, and let it leave: from here on the world knows the signature."""
    if not signer(box).has_signed(entry.submission):
        entry = box.sign(entry, signer(box, step).sign(entry.submission))
    say(f"sent {entry.update_id} {entry.submission.sequence} {entry.submission.signature}")
    return entry


def life(box: Outbox, say: Callable[[str], None], end: str) -> None:
    """Put an update in, sign and acknowledge it, and take it to one of its ends."""
    entry = box.put(PAYLOAD, HEAD, TRAINING, space_id="s", task_id="org/task", create=True, adapter=ADAPTER)
    say(f"put {entry.update_id}")
    entry = send(box, entry, say, box._step)
    entry = box.acknowledge(entry, {"ingest_seq": 1})
    say("acknowledged")
    if end == "remove":
        box.remove(entry)
        say("removed")
    elif end == "rebase":
        entry = box.rebase(entry, SECOND, 9, False)
        say(f"rebased {entry.update_id}")
        send(box, entry, say, box._step)
    else:
        box.refuse(entry, "AccessError", "no")
        say("refused")


def steps_of(directory: Path, end: str) -> int:
    names: list[str] = []
    life(Outbox(directory, names.append), lambda text: None, end)
    return len(names)


def run_killed(directory: Path, kill_at: int, end: str) -> list[str]:
    """Fork a life that dies at its step number ``kill_at``; return what it said before."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        taken = 0

        def step(name: str) -> None:
            nonlocal taken
            if taken == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            taken += 1

        def say(text: str) -> None:
            os.write(writer, text.encode() + b"\n")

        life(Outbox(directory, step), say, end)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read().split("\n")[:-1]
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child was not killed"
    return said


def violations(directory: Path, said: list[str], end: str) -> list[str]:
    """Return what a client would find wrong after the crash."""
    try:
        box = Outbox(directory)
        waiting = [entry for entry in box.entries() if box.replacement(entry) is None]
        refused = [entry for entry, _ in module.list_outbox(directory)[1]]
        found = waiting + refused
        for entry in found:
            check(entry)
    except (FedshareError, OSError, ValueError, AssertionError) as error:
        return [f"unreadable: {type(error).__name__}: {error}"]
    wrong = signed_twice(box, waiting, said)
    put = next((line.split()[1] for line in said if line.startswith("put ")), None)
    over = "removed" in said or (end == "remove" and "acknowledged" in said)
    if put is not None and end == "rebase":
        new = next((line.split()[1] for line in said if line.startswith("rebased ")), None)
        allowed = [[new]] if new is not None else [[put], [module._next_id(put)]]
        if [entry.update_id for entry in found] not in allowed:
            wrong.append(f"lost or there twice: said {said}, found {found}")
        return wrong
    if put is not None and not over and [entry.update_id for entry in found] != [put]:
        wrong.append(f"lost: said {said}, found {found}")
    if put is not None and "acknowledged" in said and any(not entry.acknowledged for entry in found):
        wrong.append("the receipt was lost")
    if "removed" in said and found:
        wrong.append("a removed update is back")
    if "refused" in said and not refused:
        wrong.append("a refused update is gone")
    return wrong


def signed_twice(box: Outbox, waiting: list[Entry], said: list[str]) -> list[str]:
    """Go on after the crash: everything that waits is sent, then one update more. No number may be another's."""
    again: list[str] = []
    for entry in waiting:
        send(box, entry, again.append, lambda name: None)
    more = signer(box).sign(Submission(uuid.uuid4().hex, "s", "org/more", True, 4, "ab" * 32))
    again.append(f"sent {more.update_id} {more.sequence} {more.signature}")
    by_id: dict[str, tuple[str, str]] = {}
    by_number: dict[str, str] = {}
    wrong = []
    for update_id, number, signature in (line.split()[1:] for line in [*said, *again] if line.startswith("sent ")):
        if by_id.setdefault(update_id, (number, signature)) != (number, signature):
            wrong.append(f"update {update_id} was sent with two signatures")
        if by_number.setdefault(number, update_id) != update_id:
            wrong.append(f"number {number} signs two updates")
    return wrong


def check(entry: Entry) -> None:
    payload = SECOND if entry.training.rebases else PAYLOAD
    assert entry.read_payload() == payload
    assert entry.read_head() == HEAD
    assert entry.read_adapter() == ADAPTER
    assert entry.submission.payload_sha256 == hashlib.sha256(payload).hexdigest()


def plant(bug: str) -> None:
    """Break the outbox on purpose."""
    broken: Any = module
    if bug == "no temporary directory":
        broken.TEMPORARY = ""
    elif bug == "no head":
        real = broken.write_flushed

        def forgetful(path: Path, data: bytes) -> None:
            if not path.name.startswith("head."):
                real(path, data)

        broken.write_flushed = forgetful
    elif bug == "refused are deleted":
        broken.Outbox.refuse = lambda box, entry, error, reason: broken.remove_tree(entry.directory)
    elif bug == "the old one goes first":
        rebase = broken.Outbox.rebase

        def hasty(box: Any, entry: Any, *arguments: Any) -> Any:
            head, adapter = entry.read_head(), entry.read_adapter()
            remove = box.remove
            remove(entry)
            broken.Entry.read_head, broken.Entry.read_adapter = lambda entry: head, lambda entry: adapter
            box.remove = lambda entry: None
            return rebase(box, entry, *arguments)

        broken.Outbox.rebase = hasty
    elif bug == "a new id that the old one does not tell":
        known: dict[str, str] = {}
        broken._next_id = lambda update_id: known.setdefault(update_id, uuid.uuid4().hex)
    elif bug == "a number is counted after its use":
        unsafe: Any = SubmissionSigner
        unsafe.sign = lambda self, submission: sign_submission(submission, CREDENTIALS, self._last() + 1)
        keep = broken.Outbox.sign

        def keep_and_count(box: Any, entry: Any, signed: Any) -> Any:
            made = keep(box, entry, signed)
            signer(box, box._step).move(1)
            return made

        broken.Outbox.sign = keep_and_count
    elif bug == "a signature is not kept":
        broken.Outbox.sign = lambda box, entry, signed: replace(entry, submission=signed)


BUGS = (
    "",
    "no temporary directory",
    "no head",
    "refused are deleted",
    "the old one goes first",
    "a new id that the old one does not tell",
    "a number is counted after its use",
    "a signature is not kept",
)
ENDS = ("remove", "refuse", "rebase")


def campaign(root: Path, bug: str) -> dict[str, Any]:
    """Kill at every step of every end, in a process of its own because of the planted bug."""
    answer = root / "answer.json"
    root.mkdir()
    child = os.fork()
    if child == 0:
        plant(bug)
        wrong: list[str] = []
        points = 0
        for end in ENDS:
            if bug and wrong:
                break  # caught: that is all there is to show
            for kill_at in range(steps_of(root / f"count-{end}", end) + 1):
                if bug and wrong:
                    break
                directory = root / f"{end}-{kill_at}"
                said = run_killed(directory, kill_at, end)
                wrong += [f"{end} at step {kill_at}: {text}" for text in violations(directory, said, end)]
                points += 1
        answer.write_text(json.dumps({"points": points, "wrong": wrong}))
        os._exit(0)
    os.waitpid(child, 0)
    found = json.loads(answer.read_text())
    assert isinstance(found, dict)
    return found


if __name__ == "__main__":
    print(json.dumps({bug: campaign(Path(sys.argv[1]) / str(number), bug) for number, bug in enumerate(BUGS)}))
