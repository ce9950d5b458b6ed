"""Watching for data: folders dropped into a directory become tasks, and nothing is taken before it is whole.

::

    incoming/<task>/train.jsonl     or train.csv, train.parquet, train.npz, a directory train/ ...: docs/data.md
                    test.jsonl      or validation = 0.2 in task.toml or [defaults]
                    task.toml       optional: keys of a [[task]] but name, train and test; kind names no code

Whoever copies a file here writes it bit by bit. A file counts as whole when its size and its time of change were the
same at two looks that lie :data:`SETTLE_S` apart; of a folder that holds for every file in it, and for which there are.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from share_client.data.content import stamps
from share_client.tasks_file import TaskConfig, TasksFile, dropped_task
from share_core.errors import ConfigError

SETTLE_S = 1.0
"""Seconds between the two looks."""

_FROM_THE_FOLDER = ("name", "train", "test")

Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of every file looked at."""


class Settling:
    """Remembers when files were seen to change."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time) -> None:
        """``clock`` measures the time between looks; ``now`` is compared with times of change."""
        self._clock = clock
        self._now = now
        self._seen: dict[tuple[Path, ...], tuple[Stamp, float]] = {}

    def is_whole(self, *paths: Path, named: bool = False) -> bool:
        """Whether nothing below ``paths`` has changed between two looks; False where one is gone.

        ``named`` paths stand in the tasks file, where one writes what is there: what was last changed longer ago than
        the time between two looks is taken at once.

        Raises:
            ConfigError: something below must not be looked at.
        """
        try:
            stamp = tuple(one for path in paths for one in stamps(path))
        except ConfigError as error:
            self._seen.pop(paths, None)
            if isinstance(error.__cause__, PermissionError):
                raise  # it does not go away by itself, as what is taken away or not yet there does
            return False
        clock = self._clock()
        known = self._seen.get(paths)
        if known is None or known[0] != stamp:
            known = self._seen[paths] = (stamp, clock)
        old = named and all(self._now() - changed_ns / 1e9 >= SETTLE_S for _, _, changed_ns in stamp)
        return bool(stamp) and (old or clock - known[1] >= SETTLE_S)


@dataclass(frozen=True)
class Dropped:
    """What one look at the watched directory found; folders without training rows are not mentioned."""

    tasks: tuple[TaskConfig, ...] = ()
    """The tasks of all whole folders, by name."""
    filling: tuple[str, ...] = ()
    """Names of the folders that are still being written to."""
    remarks: tuple[str, ...] = ()
    """Why other folders are no tasks."""


def dropped_tasks(file: TasksFile, settling: Settling | None) -> Dropped:
    """Look at every folder in the watched directory of ``file``; without ``settling`` each counts as whole."""
    tasks: list[TaskConfig] = []
    filling: list[str] = []
    remarks: list[str] = []
    names = {task.name for task in file.tasks}
    for folder in _folders(file.watch) if file.watch is not None else ():
        try:
            if not _parts(folder, "train"):
                continue
            if settling is not None and not settling.is_whole(folder):
                filling.append(folder.name)
                continue
            if folder.name in names:
                raise ConfigError(
                    f"{folder}: task {folder.name!r} is a [[task]] of {file.path} as well: give the folder another name"
                )
            tasks.append(_task(file, folder))
        except ConfigError as error:
            remarks.append(str(error))
        except OSError:
            continue  # taken away while it was looked at
    return Dropped(tuple(tasks), tuple(filling), tuple(remarks))


def _folders(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []  # reading the tasks file says what is wrong with it


def _parts(folder: Path, part: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name == part or path.name.startswith(f"{part}."))


def _task(file: TasksFile, folder: Path) -> TaskConfig:
    path = folder / "task.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    for key in _FROM_THE_FOLDER:
        if key in table:
            raise ConfigError(f"{path}: {key}: the folder says it already, take the key out")
    for part in ("train", "test"):
        found = _parts(folder, part)
        if len(found) > 1:
            names = ", ".join(one.name for one in found)
            raise ConfigError(f"{folder}: expected one {part} file, got {names}: take away all but one")
        if found:
            table[part] = found[0].name
    return dropped_task(file, folder, table)
