"""``share-server backup``: a complete server directory beside the one that serves.

Everything is put into ``TARGET.partial`` and flushed, the marker ``backup.json`` last, and then renamed: a directory
called TARGET is a complete backup. Payload files never change, so they are hard links where the file system allows it;
the journal is a consistent copy, and the payloads are those that it needs.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.durable import PRIVATE, PUBLIC, flush_directory, write_flushed
from share_core.errors import ConfigError, FedshareError
from share_server.hub.clock import now_ms
from share_server.layout import Layout
from share_server.operations.reading import JOURNAL_FILES, Told, copied, held, reading, silent
from share_server.store.journal import Journal
from share_server.store.store import Store
from share_server.store.versions import head_version, referenced_blobs

MARKER = "backup.json"
"""Written last into a backup."""

OTHER_FILES = ("server.toml", "space.toml", "space.toml.next", "enrol.key", "signing.key", "signing.pem", "ca", "tls")
"""What a server directory holds beside its store, as far as it is there."""

_GROUP = 64
"""Files between two reports of progress."""

_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
"""Why a hard link cannot be made where a copy can."""


@dataclass(frozen=True)
class Held:
    """What a journal holds."""

    version: int
    """Newest version."""
    entries: int
    """Entries of its hash chain."""
    hash: str
    """Hexadecimal hash of the last entry; empty for none."""
    payloads: tuple[str, ...] = ()
    """Digests of the payloads it needs."""


def check_target(target: Path, layout: Layout) -> Path:
    """Return where the backup grows, refusing what cannot be its place.

    Raises:
        ConfigError: the target is relative or exists, its folder does not, or it lies inside the store.
    """
    partial = target.with_name(target.name + ".partial")
    if not target.is_absolute():
        raise ConfigError(f"the target must be an absolute path, got {target}")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is no directory: make it first")
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists already: give a new name for every backup")
    if os.path.lexists(partial):
        raise ConfigError(f"{partial} is what a backup left that did not end: remove it, or wait for that backup")
    if layout.store.resolve() in (target.parent.resolve(), *target.parent.resolve().parents):
        raise ConfigError(f"{target} is inside the store: choose another place")
    return partial


async def backup_running(store: Store, target: Path) -> AsyncGenerator[tuple[int, int, int], None]:
    """Copy the server of an open store; yield (files done, files, version) as it goes on, with the version last.

    The caller keeps files from being removed meanwhile. A target that fails is no failure of the store.

    Raises:
        ConfigError: the target cannot be used or written.
    """
    layout = Layout(store.root.parent)
    partial = check_target(target, layout)
    make_partial(partial)
    work: asyncio.Future[Any] | None = None
    try:
        (partial / "store").mkdir(mode=0o700)
        what = await store.do(lambda journal: _copy_journal(journal, partial / "store" / "journal.db"))
        if isinstance(what, Exception):
            raise what
        steps = _steps(layout, partial, what.payloads)
        for done in range(0, len(steps), _GROUP):
            yield done, len(steps) + 1, 0
            work = asyncio.ensure_future(asyncio.to_thread(_run, steps[done : done + _GROUP]))
            await asyncio.shield(work)
        work = asyncio.ensure_future(asyncio.to_thread(_finish, partial, target, what))
        await asyncio.shield(work)
        yield len(steps) + 1, len(steps) + 1, what.version
    except BaseException as error:
        if work is not None and not work.done():
            await asyncio.wait([work])
        await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)  # it may hold very many files
        if isinstance(error, OSError):
            raise refusal(target, error) from error
        raise


def backup_stopped(layout: Layout, target: Path, told: Told = silent) -> int:
    """Copy the server directory of a stopped hub as it lies there; return the version it holds.

    Raises:
        ConfigError: a hub runs, or the target cannot be used or written. StorageError: the journal cannot be read.
    """
    partial = check_target(target, layout)
    with held(layout):
        what = asyncio.run(_look(layout))
        make_partial(partial)
        try:
            (partial / "store").mkdir(mode=0o700)
            payloads = tuple(sorted(path.name for path in (layout.store / "blobs").glob("*/*")))
            steps = _steps(layout, partial, payloads)
            steps += [
                _Step(layout.store / name, partial / "store" / name, link=False)
                for name in JOURNAL_FILES
                if (layout.store / name).exists()
            ]
            for done, step in enumerate(steps, start=1):
                _run([step])
                told("files", done, len(steps))
            _finish(partial, target, what)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise refusal(target, error) from error
            raise
    return what.version


async def _look(layout: Layout) -> Held:
    with copied(layout) as folder:
        if not (folder / "journal.db").exists():
            return Held(0, 0, "")
        async with reading(folder) as store:
            return await store.look(_what_is_held)


def _what_is_held(journal: Journal) -> Held:
    last = journal.row("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1")
    entries, digest = (last["seq"], last["hash"].hex()) if last else (0, "")
    payloads = tuple(sorted(digest for digest in referenced_blobs(journal) if digest))
    return Held(head_version(journal), entries, digest, payloads)


def _copy_journal(journal: Journal, path: Path) -> Held | Exception:
    """Copy on the journal's thread. What goes wrong is returned: a full target must not stop the hub."""
    what = _what_is_held(journal)
    try:
        journal.copy_to(path)
    except (FedshareError, OSError) as error:
        return ConfigError(f"the journal could not be copied to {path.parent}: {error}")
    return what


@dataclass(frozen=True)
class _Step:
    """One file to put into the backup."""

    source: Path
    target: Path
    link: bool


def _steps(layout: Layout, partial: Path, payloads: Sequence[str]) -> list[_Step]:
    """Return the files of a server directory without its journal."""
    steps = [_Step(path, partial / path.relative_to(layout.root), link=False) for path in _other_files(layout.root)]
    for digest in payloads:
        place = Path("store", "blobs", digest[:2], digest)
        steps.append(_Step(layout.root / place, partial / place, link=True))
    return steps


def _other_files(root: Path) -> Iterator[Path]:
    for name in OTHER_FILES:
        path = root / name
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from sorted(one for one in path.iterdir() if one.is_file() and not one.name.startswith("."))


def _run(steps: Sequence[_Step]) -> None:
    for step in steps:
        step.target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if step.link:
            link_or_copy(step.source, step.target)
        else:
            copy_flushed(step.source, step.target)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a payload file a second name, or copy and re-hash it where that cannot be.

    Raises:
        ConfigError: the copied bytes are not what the name says: the store is damaged.
    """
    try:
        os.link(source, target)
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    if copy_flushed(source, target) != source.name:
        raise ConfigError(f"payload {source.name} is damaged: run 'share-server verify' on the stopped server")


def copy_flushed(source: Path, target: Path) -> str:
    """Copy a file with its mode, but never readable by others where it was not; return its SHA-256, now durable."""
    mode = source.stat().st_mode & 0o777
    digest = hashlib.sha256()
    with source.open("rb") as file:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
        with os.fdopen(handle, "wb") as copy:
            while part := file.read(2**20):
                digest.update(part)
                copy.write(part)
            copy.flush()
            os.fchmod(copy.fileno(), mode)
            os.fsync(copy.fileno())
    return digest.hexdigest()


def flush_tree(root: Path) -> None:
    """Flush the names in a directory and in all below it."""
    for folder, _, _ in os.walk(root, topdown=False):
        flush_directory(Path(folder))


def put_in_place(partial: Path, target: Path) -> None:
    """Give a flushed directory its name; durable when this returns.

    Raises:
        ConfigError: something has taken the name meanwhile.
    """
    if os.path.lexists(target):
        raise ConfigError(f"{target} was made by somebody else meanwhile: give another name")
    partial.rename(target)
    flush_directory(target.parent)


def _finish(partial: Path, target: Path, what: Held) -> None:
    """Make the backup durable, mark it as complete and give it its name."""
    flush_tree(partial)
    said = {"version": what.version, "entries": what.entries, "hash": what.hash, "made_unix_ms": now_ms()}
    write_flushed(partial / MARKER, (json.dumps(said) + "\n").encode(), PUBLIC)
    flush_directory(partial)
    put_in_place(partial, target)


def make_partial(partial: Path) -> None:
    """Make the directory that grows. Whoever has made it removes it after a failure, and nobody else.

    Raises:
        ConfigError: it is there already, or cannot be made.
    """
    try:
        partial.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"{partial} could not be made: {error.strerror or error}") from error


def refusal(target: Path, error: OSError) -> ConfigError:
    """Return what to say where a directory could not be written and what had grown of it was removed."""
    return ConfigError(f"{target} could not be written: {error.strerror or error}; nothing is left of it")
