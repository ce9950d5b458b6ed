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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from share_client import outbox as module
from share_client.outbox import Entry, Outbox, Training
from share_core.errors import FedshareError

PAYLOAD, HEAD = b"p" * 5000, b"h" * 300
TRAINING = Training("task", "hash", base_version=0, loss=0.1, steps=1, seconds=1.0, rows=5)


def life(box: Outbox, say: Callable[[str], None], end: str) -> None:
    """Put an update in, acknowledge it, and take it to one of its two ends."""
    entry = box.put(PAYLOAD, HEAD, TRAINING, space_id="s", task_id="org/task", create=True)
    say(f"put {entry.update_id}")
    entry = box.acknowledge(entry, {"ingest_seq": 1})
    say("acknowledged")
    if end == "remove":
        box.remove(entry)
        say("removed")
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
        waiting = box.entries()
        refused = [entry for entry, _ in module.list_outbox(directory)[1]]
        found = waiting + refused
        for entry in found:
            check(entry)
    except (FedshareError, OSError, ValueError, AssertionError) as error:
        return [f"unreadable: {type(error).__name__}: {error}"]
    wrong = []
    put = next((line.split()[1] for line in said if line.startswith("put ")), None)
    over = "removed" in said or (end == "remove" and "acknowledged" in said)
    if put is not None and not over and [entry.update_id for entry in found] != [put]:
        wrong.append(f"lost: said {said}, found {found}")
    if put is not None and "acknowledged" in said and any(not entry.acknowledged for entry in found):
        wrong.append("the receipt was lost")
    if "removed" in said and found:
        wrong.append("a removed update is back")
    if "refused" in said and not refused:
        wrong.append("a refused update is gone")
    return wrong


def check(entry: Entry) -> None:
    assert entry.read_payload() == PAYLOAD
    assert entry.read_head() == HEAD
    assert entry.submission.payload_sha256 == hashlib.sha256(PAYLOAD).hexdigest()


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


BUGS = ("", "no temporary directory", "no head", "refused are deleted")


def campaign(root: Path, bug: str) -> dict[str, Any]:
    """Kill at every step of both ends, in a process of its own because of the planted bug."""
    answer = root / "answer.json"
    root.mkdir()
    child = os.fork()
    if child == 0:
        plant(bug)
        wrong: list[str] = []
        points = 0
        for end in ("remove", "refuse"):
            for kill_at in range(steps_of(root / f"count-{end}", end) + 1):
                if bug and wrong:
                    break  # caught: that is all there is to show
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
