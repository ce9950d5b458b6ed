"""What a client remembers of its own tasks.

::

    tasks/<task>/record.json              which data is merged in which version; what was refused and why
                 head-<version>.safetensors   the private head that belongs to the core merged in that version
                 history.jsonl            merges, evaluations, refits and restored hubs, one object a line

``record.json`` decides; a head without an entry there is left over from a crash and is overwritten in time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from share_client.durable import append_line, make_private_directory, read_json_lines, to_json
from share_core.durable import write_atomic
from share_core.errors import ConfigError

MOST_RETRAININGS = 5
"""How often the same data is trained again because the hub wants it in newer bases, before it counts as refused."""

RESTORED = "restored"
"""The event of a history after which versions above that of its line are other ones."""


@dataclass(frozen=True)
class Head:
    """One private head on disk."""

    version: int
    """The version whose core it was trained with."""
    content_hash: str
    """Hash of the data it knows the classes of."""
    update_id: str = ""
    """The update that was merged; empty: not known."""


@dataclass(frozen=True)
class BrokenOff:
    """Trainings of one attempt that broke off, one after the other."""

    attempt: str = ""
    """Of which attempt."""
    times: int = 0
    """How many in a row."""
    not_before: float = 0.0
    """When it is tried again, seconds since 1970."""
    reason: str = ""
    """Why, in words."""


@dataclass(frozen=True)
class TaskRecord:
    """What is known of one task; ``record.json``."""

    task: str
    """Name inside the organisation."""
    heads: tuple[Head, ...] = ()
    """Merged trainings, oldest first. Older ones are pruned once every version they belong to is evaluated."""
    refused_hash: str = ""
    """The attempt (:attr:`.trainer.LocalTask.attempt`: data and settings) that was refused for good; another is made
    only when one of them changes."""
    refused_reason: str = ""
    """Why."""
    retrainings: int = 0
    """Trainings thrown away in a row because their version was no longer kept."""
    broken_off: BrokenOff = BrokenOff()
    """What broke off since the last merge or refusal."""
    refits: int = 0
    """How often the newest data was refitted in newer bases, or could have been and was not, see :mod:`.refits`."""
    columns: int = 0
    """Basis vectors that the last training, or the last such try, could use; 0: not known."""
    captured: float = 0.0
    """Share of the gradient's energy that the bases of the last training captured, see :mod:`.refits`."""
    task_id: str = ""
    """``organisation/name`` that it is merged into; empty: a task of this organisation."""

    def wants(self, content_hash: str, attempt: str = "") -> bool:
        """Whether data with this hash has yet to be trained and this attempt, or else the hash, was not refused."""
        if self.refused_hash == (attempt or content_hash):
            return False
        return not self.heads or self.heads[-1].content_hash != content_hash

    def id_for(self, organisation: str) -> str:
        """Return the id of the task, for a client of ``organisation``."""
        return self.task_id or f"{organisation}/{self.task}"

    def head_at(self, version: int) -> Head | None:
        """Return the head that belongs to the core a version holds; None before the first merge."""
        fitting = [head for head in self.heads if head.version <= version]
        return fitting[-1] if fitting else None


class Records:
    """All task records of one client directory. One process at a time; the session's lock sees to it."""

    def __init__(self, directory: Path) -> None:
        self._directory = make_private_directory(directory)
        self._records = {path.parent.name: _read(path) for path in sorted(self._directory.glob("*/record.json"))}
        self._evaluated: dict[str, set[int]] = {}
        for name in self._records:
            for line in self.history(name):
                self._note(name, line)

    def get(self, task: str) -> TaskRecord:
        """Return what is known of a task; an empty record if nothing is."""
        return self._records.get(task, TaskRecord(task))

    def all(self) -> list[TaskRecord]:
        """Return every record, by name."""
        return [self._records[name] for name in sorted(self._records)]

    def merged(
        self,
        task: str,
        content_hash: str,
        version: int,
        head: bytes,
        *,
        refit: bool = False,
        columns: int = 0,
        captured: float = 0.0,
        task_id: str = "",
        update_id: str = "",
    ) -> None:
        """Record that a training was merged into a task in ``version``. Doing it twice changes nothing."""
        record = self.get(task)
        if any(known.version == version for known in record.heads):
            return
        write_atomic(self._head_path(task, version), head)
        earlier = record.heads if record.task_id in ("", task_id) else ()  # those of another task belong to its cores
        heads = tuple(sorted((*earlier, Head(version, content_hash, update_id)), key=lambda head: head.version))
        fresh = replace(record, heads=heads, refused_hash="", refused_reason="", retrainings=0, broken_off=BrokenOff())
        refits = record.refits + 1 if refit else 0
        self._save(replace(fresh, refits=refits, columns=columns, captured=captured, task_id=task_id))

    def not_refitted(self, task: str, columns: int) -> None:
        """Record that a refit in bases of ``columns`` vectors was not worth sending."""
        record = self.get(task)
        self._save(replace(record, refits=record.refits + 1, columns=columns))

    def refused(self, task: str, attempt: str, reason: str) -> None:
        """Record that nothing will come of an attempt: what was trained is never taken, or cannot be trained."""
        fresh = replace(self.get(task), retrainings=0, broken_off=BrokenOff())
        self._save(replace(fresh, refused_hash=attempt, refused_reason=reason))

    def broke_off(self, task: str, broken_off: BrokenOff) -> None:
        """Record that a training broke off."""
        self._save(replace(self.get(task), broken_off=broken_off))

    def moved(self, task: str, version: int, merged: int) -> None:
        """Record that the hub has merged in the version ``merged`` what it had merged in ``version`` before."""
        record = self.get(task)
        write_atomic(self._head_path(task, merged), self._head_path(task, version).read_bytes())
        heads = (replace(head, version=merged) if head.version == version else head for head in record.heads)
        self._save(replace(record, heads=tuple(sorted(heads, key=lambda head: head.version))))
        self._head_path(task, version).unlink(missing_ok=True)

    def lost(self, task: str, version: int) -> None:
        """Record that the hub no longer holds what it merged in ``version``."""
        record = self.get(task)
        self._save(replace(record, heads=tuple(head for head in record.heads if head.version != version)))
        self._head_path(task, version).unlink(missing_ok=True)

    def retrain(self, task: str) -> bool:
        """Record that a training was in vain and another try is due; False, and nothing, if there were too many."""
        record = self.get(task)
        if record.retrainings + 1 >= MOST_RETRAININGS:
            return False
        self._save(replace(record, retrainings=record.retrainings + 1))
        return True

    def read_head(self, task: str, head: Head) -> Mapping[str, Tensor]:
        """Return the tensors of a private head."""
        return safetensors.torch.load(self.head_bytes(task, head))

    def head_bytes(self, task: str, head: Head) -> bytes:
        """Return a private head as the safetensors file that was kept, with its metadata."""
        return self._head_path(task, head.version).read_bytes()

    def prune(self, walked: int) -> None:
        """Drop heads that no version from ``walked`` on belongs to."""
        for record in self.all():
            current = record.head_at(walked)
            stale = [head for head in record.heads if current is not None and head.version < current.version]
            if stale:
                self._save(replace(record, heads=tuple(head for head in record.heads if head not in stale)))
                for head in stale:
                    self._head_path(record.task, head.version).unlink(missing_ok=True)

    def is_evaluated(self, task: str, version: int) -> bool:
        """Whether this version was evaluated, and reported, before."""
        return version in self._evaluated.get(task, set())

    def add_history(self, task: str, line: Mapping[str, Any]) -> None:
        """Append one object to the task's history."""
        append_line(make_private_directory(self._directory / task) / "history.jsonl", json.dumps(line, sort_keys=True))
        self._note(task, line)

    def _note(self, task: str, line: Mapping[str, Any]) -> None:
        known = self._evaluated.get(task, set())
        if line["event"] == "evaluation":
            self._evaluated[task] = known | {line["version"]}
        elif line["event"] == RESTORED:
            self._evaluated[task] = {version for version in known if version <= line["version"]}

    def history(self, task: str) -> list[dict[str, Any]]:
        """Return the task's history, oldest first, without what it says of versions that a restored hub has lost."""
        lines = (line for line in read_json_lines(self._directory / task / "history.jsonl") if "event" in line)
        return _standing(lines)

    def _head_path(self, task: str, version: int) -> Path:
        return make_private_directory(self._directory / task) / f"head-{version:08d}.safetensors"

    def _save(self, record: TaskRecord) -> None:
        directory = make_private_directory(self._directory / record.task)
        write_atomic(directory / "record.json", to_json(asdict(record)))
        self._records[record.task] = record


def _standing(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["event"] == RESTORED:
            kept = [one for one in kept if one.get("version", 0) <= line["version"]]
        else:
            kept.append(line)
    return kept


def _read(path: Path) -> TaskRecord:
    try:
        document = json.loads(path.read_bytes())
        heads = tuple(Head(**head) for head in document.pop("heads"))
        broken_off = BrokenOff(**document.pop("broken_off", {}))
        return TaskRecord(**document, heads=heads, broken_off=broken_off)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}): restore it, or remove it to train the task again"
        ) from error
