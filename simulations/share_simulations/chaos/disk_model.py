"""A disk without mercy: what may lie on it when the power fails at a given moment.

Built from the trace of one life with the bytes of all writes. Durable is what was flushed: the content of a file when a
flush of it has returned, a name when a flush of its directory has returned. Everything else done so far may be there or
not: a write may be lost, whole, or torn at sectors of 512 bytes, in any order; a call that had not returned counts as
perhaps done. Names that were not flushed are lost from some moment on, in the order of a journal, or each on its own,
which is harsher than the file systems that people use.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from share_core.errors import ConfigError
from share_simulations.chaos.lab import Witness
from share_simulations.chaos.ptrace import GO, Call, Verdict
from share_simulations.chaos.scenario import Promised

SECTOR = 512
"""Bytes that a disk writes whole."""

MODES = ("nothing", "journal", "harsh", "everything")
"""What survives of that which was not flushed: nothing; names in their order, writes at random; all at random; all."""


_NEVER = 2**62


@dataclass
class Step:
    """One traced call."""

    call: Call
    entered: int
    """Moment at which it began."""
    left: int = _NEVER
    """Moment at which it returned."""
    result: int = -1
    """What it returned."""


class Recorder(Witness):
    """Writes down one life: calls with their data, and promises, each with its moment."""

    wants_data = True

    def __init__(self, promised: Promised) -> None:
        super().__init__(promised)
        self.first = promised.copy()
        self.steps: list[Step] = []
        self.marks: list[tuple[int, bytes]] = []
        self.moment = 0
        self._running: dict[int, Step] = {}

    def entered(self, call: Call) -> Verdict:
        """Note the begin of a call."""
        self.moment += 1
        step = Step(call, self.moment)
        self._running[call.thread] = step
        self.steps.append(step)
        return GO

    def left(self, call: Call, result: int) -> None:
        """Note the end of a call."""
        self.moment += 1
        step = self._running.pop(call.thread)
        step.left, step.result = self.moment, result

    def marked(self, text: bytes) -> None:
        """Note a promise."""
        self.moment += 1
        super().marked(text)
        self.marks.append((self.moment, text))

    def promised_at(self, moment: int) -> Promised:
        """Return what had been promised up to a moment."""
        promised = self.first.copy()
        for when, text in self.marks:
            if when <= moment:
                promised.take(text)
        return promised


class _Change(NamedTuple):
    """One change of a file's content: bytes at an offset, or a new length if ``data`` is None."""

    done: int
    offset: int
    data: bytes | None


@dataclass
class _File:
    """One inode."""

    durable: bytes
    pending: list[_Change] = field(default_factory=list)

    def flush(self, before: int) -> None:
        """Make durable what was done before a moment."""
        kept = [change for change in self.pending if change.done < before]
        self.durable = _apply(self.durable, kept)
        self.pending = [change for change in self.pending if change.done >= before]


@dataclass
class _NameChange:
    """One change of names, in the order in which they were done."""

    done: int
    kind: str
    """create, mkdir, rename, link, unlink or rmdir."""
    path: str
    target: str = ""
    file: int = -1
    durable: bool = False

    @property
    def directory(self) -> str:
        """The directory whose flush makes it durable."""
        return str(Path(self.target or self.path).parent)


class Disk:
    """The state of one disk at one moment of a recorded life."""

    def __init__(self, root: Path, base: dict[str, bytes | None], recorder: Recorder, moment: int) -> None:
        """Replay the life up to ``moment``.

        Args:
            root: the watched directory.
            base: what was durable before, by absolute path; None is a directory.
            recorder: the life.
            moment: when the power fails.

        Raises:
            ConfigError: the life holds a call that this model does not know.
        """
        self._root = root
        self._base = base
        self._files: list[_File] = []
        self._first: dict[str, int] = {}
        self._changes: list[_NameChange] = []
        for path, data in base.items():
            if data is not None:
                self._first[path] = self._new_file(data)
        self._live = dict(self._first)
        done = [step for step in recorder.steps if step.entered <= moment]
        for step in sorted(done, key=lambda step: step.left):
            failed = step.result < 0 and step.left < _NEVER
            # A flush that had not returned promises nothing.
            running_flush = step.left > moment and step.call.name in ("fsync", "fdatasync")
            if not failed and not running_flush:
                self._replay(step)

    def _new_file(self, data: bytes = b"") -> int:
        self._files.append(_File(data))
        return len(self._files) - 1

    def _replay(self, step: Step) -> None:
        call, done = step.call, step.left
        match call.name:
            case "open" | "openat" | "creat":
                self._open(call, done)
            case "write" | "pwrite64":
                data = call.data if step.result < 0 else call.data[: step.result]
                self._change(call.path, _Change(done, call.position, data))
            case "ftruncate" | "truncate":
                self._change(call.path, _Change(done, call.size, None))
            case "fsync" | "fdatasync":
                self._flush(call.path, step.entered)
            case "rename" | "renameat" | "renameat2" | "link" | "linkat" | "unlink" | "unlinkat" | "rmdir":
                self._rename(call, done)
            case "mkdir" | "mkdirat":
                self._changes.append(_NameChange(done, "mkdir", call.path))
            case "fallocate":
                pass  # room without content: nothing that could be lost
            case name:
                raise ConfigError(f"the hub calls {name}, which the model of the disk does not know: teach it")

    def _open(self, call: Call, done: int) -> None:
        if call.path not in self._live:
            self._live[call.path] = self._new_file()
            self._changes.append(_NameChange(done, "create", call.path, file=self._live[call.path]))
        elif call.flags & os.O_TRUNC:
            self._change(call.path, _Change(done, 0, None))

    def _change(self, path: str, change: _Change) -> None:
        if path in self._live:  # a file without a name is gone after a power cut anyway
            self._files[self._live[path]].pending.append(change)

    def _flush(self, path: str, before: int) -> None:
        if path in self._live:
            self._files[self._live[path]].flush(before)
        for change in self._changes:
            if change.directory == path and change.done < before:
                change.durable = True

    def _rename(self, call: Call, done: int) -> None:
        kind = call.name.removesuffix("at2").removesuffix("at")
        file = self._live.get(call.path, -1)
        if kind in ("rename", "unlink"):
            self._live.pop(call.path, None)
        if call.target and file >= 0:
            self._live[call.target] = file
        self._changes.append(_NameChange(done, kind, call.path, call.target, file))

    def after_cut(self, mode: str, draw: random.Random) -> dict[str, bytes | None]:
        """Return what lies on the disk when the power is back: content by absolute path, None for a directory."""
        names: dict[str, int | None] = {path: self._first.get(path) for path in self._base}
        survivors = self._surviving(mode, draw)
        for change in survivors:
            _rename_in(names, change)
        found: dict[str, bytes | None] = {}
        for path in sorted(names):
            if str(Path(path).parent) != str(self._root) and str(Path(path).parent) not in found:
                continue  # its directory is lost, and everything in it
            file = names[path]
            found[path] = None if file is None else self._content(self._files[file], mode, draw)
        return found

    def _surviving(self, mode: str, draw: random.Random) -> list[_NameChange]:
        if mode == "everything":
            return self._changes
        if mode == "nothing":
            return [change for change in self._changes if change.durable]
        if mode == "harsh":
            likely = draw.choice((0.2, 0.5, 0.9))
            return [change for change in self._changes if change.durable or draw.random() < likely]
        last = max((at for at, change in enumerate(self._changes, 1) if change.durable), default=0)
        return self._changes[: draw.randint(last, len(self._changes))]

    def _content(self, file: _File, mode: str, draw: random.Random) -> bytes:
        if mode == "everything" or not file.pending:
            return _apply(file.durable, file.pending)
        if mode == "nothing":
            return file.durable
        likely = draw.choice((0.2, 0.5, 0.9))
        kept: list[_Change] = []
        for change in file.pending:
            if draw.random() < likely:
                kept.append(change)
            elif change.data is not None and draw.random() < 0.5:
                kept += _torn(change, draw)
        return _apply(file.durable, kept)


def _torn(change: _Change, draw: random.Random) -> list[_Change]:
    """Return a random part of a write, in sectors of the file."""
    data, parts, at = change.data or b"", [], 0
    while at < len(data):
        size = min(SECTOR - (change.offset + at) % SECTOR, len(data) - at)
        if draw.random() < 0.5:
            parts.append(_Change(change.done, change.offset + at, data[at : at + size]))
        at += size
    return parts


def _apply(content: bytes, changes: list[_Change]) -> bytes:
    if not changes:
        return content
    found = bytearray(content)
    for change in changes:
        if change.data is None:
            del found[change.offset :]
            found.extend(bytes(change.offset - len(found)))
        else:
            found.extend(bytes(max(0, change.offset - len(found))))
            found[change.offset : change.offset + len(change.data)] = change.data
    return bytes(found)


def _rename_in(names: dict[str, int | None], change: _NameChange) -> None:
    """Apply one change of names; what it was based on may be lost."""
    match change.kind:
        case "create":
            names[change.path] = change.file
        case "mkdir":
            names.setdefault(change.path, None)
        case "rename":
            names.pop(change.path, None)
            names[change.target] = change.file
        case "link":
            names[change.target] = change.file
        case _:
            names.pop(change.path, None)


def read_tree(folder: Path, at: Path) -> dict[str, bytes | None]:
    """Return everything below ``folder`` as if it lay at ``at``, by absolute path, directories as None."""
    found: dict[str, bytes | None] = {str(at): None}
    for path in sorted(folder.rglob("*")):
        found[str(at / path.relative_to(folder))] = None if path.is_dir() else path.read_bytes()
    return found


def write_tree(tree: dict[str, bytes | None]) -> None:
    """Write what :meth:`Disk.after_cut` returned; parents come first in it."""
    for name, data in tree.items():
        if data is None:
            Path(name).mkdir()
        else:
            Path(name).write_bytes(data)
