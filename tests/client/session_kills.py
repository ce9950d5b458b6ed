"""Kill sessions at chosen steps of the outbox and let the next session continue.

Run as a script: ``session_kills.py BUG DIRECTORY...``: one enrolled client directory for each step in :data:`STEPS`,
with ``tasks.json`` in it. Each session runs in a forked process. The last line printed is a JSON object: for each step
the trainings, merges and evaluations that the directory tells of afterwards. With fewer directories the last steps are
taken.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

from share_client import session
from share_client.outbox import Entry, Outbox
from share_client.records import Records
from share_client.sending import Sender
from share_proto.v1 import hub_pb2

STEPS = ("rename entry", "put done", "write receipt", "acknowledge done", "remove entry", "remove done")
"""Where the first session dies: before the update is durable, and after each thing that happens to it later."""

OPTIONS = session.SessionOptions(linger_s=0.3, poll_s=0.02, lock_s=5.0)


def load_trainer() -> Any:
    found = importlib.util.spec_from_file_location("fake_trainer", Path(__file__).with_name("fake_trainer.py"))
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def plant(bug: str) -> None:
    if bug == "removed before it is recorded":
        entries, outboxes, senders = cast(Any, Entry), cast(Any, Outbox), cast(Any, Sender)
        keep, remove = senders._keep, outboxes.remove

        def remove_first(sender: Any, entry: Entry, record: hub_pb2.UpdateRecord) -> None:
            head = entry.read_head()
            remove(sender._outbox, entry)
            entries.read_head = lambda entry: head
            outboxes.remove = lambda box, entry: None
            keep(sender, entry, record)

        senders._keep = remove_first


def forked(root: Path, trainer: Any, kill_at: str) -> int:
    """Run one session; return how its process ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        if kill_at:

            def step(name: str) -> None:
                if name == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            cast(Any, session).Outbox = functools.partial(Outbox, step=step)
        session.run_session(root, root / "tasks.json", trainer=trainer, options=OPTIONS)
        os._exit(0)
    finally:
        os._exit(1)


def look(root: Path) -> dict[str, Any]:
    """Return what happened to the client's tasks, from its own files."""
    records = Records(root / "tasks")
    history = [line for record in records.all() for line in records.history(record.task)]
    return {
        "trainings": len((root / "trained.jsonl").read_text().splitlines()),
        "merged": [line["update_id"] for line in history if line["event"] == "merged"],
        "evaluated": sorted({line["version"] for line in history if line["event"] == "evaluation"}),
        "merged_in": [line["version"] for line in history if line["event"] == "merged"],
        "left": [path.name for path in (root / "outbox").iterdir() if path.name != "refused"],
    }


def main(bug: str, roots: list[Path]) -> dict[str, Any]:
    plant(bug)
    module = load_trainer()
    answer = {}
    for step, root in zip(STEPS[-len(roots) :], roots, strict=True):
        trainer = module.FakeTrainer(root / "tasks.json")
        killed = forked(root, trainer, step)
        assert os.WIFSIGNALED(killed), f"the session did not reach {step!r}: {killed}"
        ended = forked(root, trainer, "")
        assert ended == 0, f"the session after {step!r} failed: {ended}"
        answer[step] = look(root)
    return answer


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], [Path(argument) for argument in sys.argv[2:]])))
