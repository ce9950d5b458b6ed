"""Planted bugs: each breaks one rule of the hub, and a campaign that does not notice it proves nothing.

They are planted in the traced child only, at the borders that outlast a rewrite of the store: the operating system's
calls, SQLite's statements, and the engine's named parts.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError, UnavailableError
from share_proto.v1 import hub_pb2
from share_server.hub import collecting
from share_server.hub.intake import Intake
from share_server.store import pages, versions
from share_server.store.blobs import BlobStore
from share_server.store.journal import Journal

Say = Callable[[str], None]


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    """Short name."""
    what: str
    """What is wrong in it, in words."""
    campaign: str
    """The campaign that must catch it: syscalls, disk, power or bitflip."""
    plant: Callable[[Say], None]
    """Breaks this process. It is called in a child, before the hub opens."""
    recovery: bool = False
    """Whether the bug is in recovery, so that the recovering process has it too."""
    near: str = ""
    """Where it shows: calls that are tried first (syscalls and disk), or the kind of file that is damaged (bitflip)."""


class _Connection(sqlite3.Connection):
    """A connection whose statements can be watched and changed."""

    def execute(self, statement: str, values: Any = (), /) -> sqlite3.Cursor:
        """Run a statement as the planted bug wants it."""
        cursor = super().execute(_rewrite(statement), values)
        _after(self, statement, values)
        return cursor


def _unchanged(statement: str) -> str:
    return statement


def _nothing(*_: Any) -> None:
    return


_rewrite: Callable[[str], str] = _unchanged
_after: Callable[[sqlite3.Connection, str, Any], None] = _nothing


def _replace(owner: object, name: str, value: object) -> None:
    """Put something else in the place of a function that must be there.

    Raises:
        ConfigError: it is gone: the planted bug must be planted elsewhere.
    """
    if not hasattr(owner, name):
        raise ConfigError(f"{owner} has no {name} any more: plant this bug elsewhere")
    setattr(owner, name, value)


def _hook(
    rewrite: Callable[[str], str] = _unchanged, after: Callable[[sqlite3.Connection, str, Any], None] = _nothing
) -> None:
    """Let the statements of every connection pass through these; in this process, for good."""
    global _rewrite, _after
    _rewrite, _after = rewrite, after
    honest = sqlite3.connect
    _replace(sqlite3, "connect", lambda *args, **options: honest(*args, **{**options, "factory": _Connection}))


def _ack_before_row(_: Say) -> None:
    honest = Intake.receive

    async def hasty(self: Intake, caller: Any, messages: AsyncIterator[hub_pb2.SubmitRequest], *rest: Any) -> Any:
        read = asyncio.Event()

        async def watched() -> AsyncIterator[hub_pb2.SubmitRequest]:
            async for message in messages:
                yield message
            read.set()

        work = asyncio.ensure_future(honest(self, caller, watched(), *rest))
        everything = asyncio.ensure_future(read.wait())
        await asyncio.wait({work, everything}, return_when=asyncio.FIRST_COMPLETED)
        everything.cancel()
        return work.result() if work.done() else (None, False)

    _replace(Intake, "receive", hasty)


def _row_before_payload(_: Say) -> None:
    honest, waiting, turn = os.rename, list[tuple[Any, Any]](), threading.Lock()

    def later(source: Any, target: Any, **options: Any) -> None:
        if "/blobs/" not in os.fspath(target):
            honest(source, target, **options)
            return
        with turn:
            waiting.append((source, target))

    def after(_: sqlite3.Connection, statement: str, __: Any) -> None:
        if statement == "COMMIT":
            with turn:
                while waiting:
                    honest(*waiting.pop(0))

    _replace(os, "rename", later)
    _replace(os, "replace", later)
    _hook(after=after)


def _merge_in_two(_: Say) -> None:
    def after(connection: sqlite3.Connection, statement: str, _: Any) -> None:
        if statement.lstrip().startswith("INSERT INTO versions"):
            sqlite3.Connection.execute(connection, "COMMIT")
            sqlite3.Connection.execute(connection, "BEGIN IMMEDIATE")

    _hook(after=after)


def _publish_before_commit(say: Say) -> None:
    def after(_: sqlite3.Connection, statement: str, values: Any) -> None:
        if statement.lstrip().startswith("INSERT INTO versions"):
            version = values["version"] if isinstance(values, dict) else values[0]
            say(f"published {version} ")

    _hook(after=after)


def _skip_flush(skip: Callable[[int], bool]) -> None:
    """Let flushes of the chosen descriptors do nothing."""
    for name in ("fsync", "fdatasync"):
        honest = getattr(os, name)

        def lying(file: int, honest: Callable[[int], None] = honest) -> None:
            if not skip(file):
                honest(file)

        _replace(os, name, lying)


def _is_directory(file: int) -> bool:
    return stat.S_ISDIR(os.fstat(file).st_mode)


def _is_parent(file: int) -> bool:
    """Return whether this is a directory of directories: a flush of it keeps the names of new ones."""
    return _is_directory(file) and any(entry.is_dir() for entry in os.scandir(file))


def _is_payload(file: int) -> bool:
    return "/staging/" in os.readlink(f"/proc/self/fd/{file}")  # noqa: PTH115


def _no_file_flush(_: Say) -> None:
    _skip_flush(_is_payload)


def _no_name_flush(_: Say) -> None:
    _skip_flush(_is_directory)


def _no_parent_flush(_: Say) -> None:
    _skip_flush(_is_parent)


def _journal_flushes(mode: str) -> None:
    def rewrite(statement: str) -> str:
        return f"PRAGMA synchronous={mode}" if statement.lower().startswith("pragma synchronous") else statement

    _hook(rewrite=rewrite)


def _flush_again(_: Say) -> None:
    for name in ("fsync", "fdatasync"):
        honest = getattr(os, name)

        def stubborn(file: int, honest: Callable[[int], None] = honest) -> None:
            try:
                honest(file)
            except OSError:
                honest(file)

        _replace(os, name, stubborn)


def _disk_full_ignored(_: Say) -> None:
    honest = os.write

    def careless(file: int, data: Any) -> int:
        try:
            return honest(file, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(data)

    _replace(os, "write", careless)


def _failure_is_a_delay(_: Say) -> None:
    honest = os.fsync

    def polite(file: int) -> None:
        try:
            honest(file)
        except OSError as error:
            raise UnavailableError("the disk is busy: try again") from error

    _replace(os, "fsync", polite)


def _trust_payloads(_: Say) -> None:
    _replace(BlobStore, "verify", _nothing)


def _collect_files_first(_: Say) -> None:
    """Remove the payloads of old versions before the journal says that they may go."""
    honest, made = versions.mark_collected, BlobStore.__init__
    stores: list[BlobStore] = []

    def remembered(self: BlobStore, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        stores.append(self)

    def hasty(journal: Journal, before: int) -> int:
        stores[-1].remove(collecting._payloads(journal, before))
        return honest(journal, before)

    _replace(BlobStore, "__init__", remembered)
    _replace(collecting, "mark_collected", hasty)


def _sums_not_flushed(_: Say) -> None:
    def careless(path: Path, data: bytes) -> None:
        path.write_bytes(data)

    _replace(pages, "write_atomic", careless)


def _trust_pages(_: Say) -> None:
    _replace(pages.PageSums, "check", _nothing)


def _trust_log(_: Say) -> None:
    """Take the journal for whole, wherever its log ends."""

    def careless(self: Journal) -> None:
        self._count = int(self._scalar("SELECT value FROM meta WHERE name = 'transactions'"))

    _replace(Journal, "_compare_with_anchor", careless)


MUTANTS = (
    Mutant(
        "ack-before-row", "the client is answered before its row is durable", "syscalls", _ack_before_row, near="fsync"
    ),
    Mutant(
        "row-before-payload",
        "a row is committed before its payload has its name",
        "syscalls",
        _row_before_payload,
        near="rename store/staging",
    ),
    Mutant(
        "merge-in-two",
        "a merge is two transactions instead of one",
        "syscalls",
        _merge_in_two,
        near="pwrite64 store/anchor",
    ),
    Mutant(
        "publish-first",
        "a version is published before it is committed",
        "syscalls",
        _publish_before_commit,
        near="fdatasync store/journal.db-wal",
    ),
    Mutant(
        "files-first",
        "payloads are collected before the journal lets them go",
        "syscalls",
        _collect_files_first,
        near="unlink store/blobs",
    ),
    Mutant("no-file-flush", "payloads are not flushed to the disk", "power", _no_file_flush),
    Mutant("no-name-flush", "names are not flushed to the disk", "power", _no_name_flush),
    Mutant("no-parent-flush", "names of new directories are not flushed", "power", _no_parent_flush),
    Mutant("journal-off", "SQLite runs with synchronous=OFF", "power", lambda _: _journal_flushes("OFF")),
    Mutant("journal-normal", "SQLite runs with synchronous=NORMAL", "power", lambda _: _journal_flushes("NORMAL")),
    Mutant("sums-not-flushed", "the log is emptied before the page sums are durable", "power", _sums_not_flushed),
    Mutant("flush-again", "a failed flush is tried again", "disk", _flush_again, near="fsync store/"),
    Mutant(
        "disk-full-ignored",
        "a write that found no room counts as done",
        "disk",
        _disk_full_ignored,
        near="write store/staging",
    ),
    Mutant(
        "failure-is-a-delay",
        "a failed flush is answered with 'try again' and forgotten",
        "disk",
        _failure_is_a_delay,
        near="fsync store/",
    ),
    Mutant("trust-payloads", "recovery does not read the payloads", "bitflip", _trust_payloads, True, "update"),
    Mutant("trust-pages", "recovery does not compare pages with their sums", "bitflip", _trust_pages, True, "journal"),
    Mutant("trust-log", "recovery does not ask the anchor where the log ends", "bitflip", _trust_log, True, "log"),
)
"""Every planted bug."""


def mutants_of(campaign: str) -> tuple[Mutant, ...]:
    """Return the planted bugs that one campaign must catch."""
    return tuple(mutant for mutant in MUTANTS if mutant.campaign == campaign)
