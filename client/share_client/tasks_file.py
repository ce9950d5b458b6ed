"""The file ``tasks.toml``: which backbone a client trains on and which tasks it owns.

::

    backbone = "digits-vit"        # or "minilm", a model directory, or a table: see share_client.backbone_config
    device = "auto"                # auto | cpu | cuda
    watch = "incoming"             # optional: every folder dropped into it is a task, see docs/life.md

    [defaults]                     # any key of [[task]] but name, train and test
    epochs = 6

    [[task]]
    name = "rot90"
    kind = "image-classification"  # or another of KINDS in share_client.kind_names, or "module:object" of your own
    train = "rot90/train.npz"      # relative to the directory of tasks.toml
    test = "rot90/test.npz"        # or validation = 0.2: hold out a fifth of train
    share_with = ["lab"]           # or "everybody"; or owner = "acme" for a task of others: docs/adapters.md
    columns = { label = "gold" }   # where a column is not called as its field is

    [task.options]                 # what only this kind knows

    [privacy]                      # for every task; [task.privacy] after a [[task]] replaces it for that task
    mechanism = "dp-sgd"           # or "coefficients"; see docs/privacy.md
    epsilon = 4.0                  # or noise_multiplier

Every mistake is a :class:`share_core.errors.ConfigError` that names the file, the task, the key, what was expected
and what is there.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from share_client import values
from share_client.backbone_config import BackboneConfig, read_backbone
from share_client.kind_names import KINDS, is_import_path
from share_client.privacy_table import PrivacyConfig, read_privacy
from share_client.sharing import ONE_OWNER, read_organisation, read_share_with
from share_core.errors import ConfigError, TaskNameError
from share_core.names import check_name
from share_core.privacy import COEFFICIENTS, SAMPLES

_T = TypeVar("_T")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16", "auto")
_TOP = ("backbone", "device", "watch", "defaults", "privacy", "task")
_NOT_IN_DEFAULTS = ("name", "train", "test", "privacy")


@dataclass(frozen=True)
class TaskConfig:
    """One ``[[task]]``: a private data set to learn, and how."""

    name: str
    """Name inside the member's organisation; the task id is ``organisation/name``."""
    kind: str
    """One of :data:`~.kind_names.KINDS`, or ``FOLDER/module:object``, absolute, for one of the client's own."""
    train: Path
    """Absolute path of the training rows: a file or directory in one of the formats of docs/data.md."""
    test: Path | None = None
    """Absolute path of the test rows. Used for evaluation only. None: :attr:`validation` of the training rows."""
    validation: float | None = None
    """Share of the training rows that is held out as test rows, where there is no :attr:`test`."""
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Name of the column of a field, such as ``{"text": "sentence"}``, where it is not the field's own name."""
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    """The table ``[task.options]``, which the kind reads and checks by :func:`read_options`."""
    epochs: int | None = None
    """Passes over the training rows. None: 3, or without DP-SGD more where that would be fewer than 40 steps."""
    batch_size: int = 32
    """Rows in one step."""
    learning_rate: float | None = None
    """Adam's step for a LoRA factor; the other parameters' steps are derived from it. None: 2e-3, or 4e-3 in fewer than
    60 steps."""
    directions: int | None = None
    """Free directions phi at each site. None: as the default budget buys, see :mod:`~.training.adaptation`."""
    pseudo_rank: int | None = None
    """Largest rank p of the coefficients at each site. None: the trainer's default."""
    seed: int = 0
    """Seed of initialisation and of the order of the rows."""
    rows: int | None = None
    """Use only the first so many training rows. None: all."""
    test_rows: int | None = None
    """Use only the first so many test rows. None: all."""
    max_length: int = 64
    """Longest text in tokens; what is beyond is cut. Without meaning for images."""
    share_head: bool = False
    """Whether the head's tensors leave with the update, and the digest of its labels: for who may contribute."""
    share_with: tuple[str, ...] = ()
    """Organisations that may contribute too, or (``everybody``,): counts when the first update makes the task."""
    owner: str = ""
    """The organisation whose task it is; it is never made from here. Empty: this client's own."""
    refit: bool = False
    """Whether coefficients are learned again when the subspace has grown, see :mod:`share_client.refits`. Off by
    default: it costs bytes, and of the 1.22 points of accuracy that it gained on digits, longer training without newer
    bases gains .90 (docs/adr/0019)."""
    pace: float = 0.0
    """Seconds slept after each step, to simulate slow hardware."""
    precision: str = "fp32"
    """``fp32``, ``bf16`` (matrix products in bfloat16), or ``auto``: bf16 on CUDA devices that can, else fp32."""
    accumulate: int = 1
    """Parts into which the rows of one step are cut to save memory; it changes no result."""
    checkpointing: bool = False
    """Whether activations are computed again instead of being kept, to save memory; it changes no result."""
    budget: float | None = None
    """Share of the numbers of a LoRA of rank 8 that an update sends at most. It is then trained as wide as that, and
    what was learned decides what is kept at each site. None: 0.2 where that is worth it, unless :attr:`directions` is
    given."""
    patience: int | None = None
    """Passes without a lower loss on a held-out tenth of the training rows after which training ends, and what was best
    is kept. None: all passes are made, on all rows."""
    privacy: PrivacyConfig | None = None
    """Clipping and noise. None: updates carry none."""

    @property
    def is_shared(self) -> bool:
        """Whether several organisations contribute, so that the label schema is told."""
        return bool(self.owner or self.share_with)


@dataclass(frozen=True)
class TasksFile:
    """A whole ``tasks.toml``."""

    path: Path
    """Where it was read."""
    backbone: BackboneConfig
    """What to load and what to adapt in it; paths are absolute."""
    device: str
    """``auto``, ``cpu`` or ``cuda``."""
    tasks: tuple[TaskConfig, ...]
    """In the order of the file, which is the order of work."""
    watch: Path | None = None
    """Absolute path of the directory into which folders with further tasks are dropped; None if there is none."""
    defaults: Mapping[str, object] = field(default_factory=dict, hash=False)
    """The table ``[defaults]``, with ``[privacy]``: it counts for dropped folders too."""


@dataclass(frozen=True)
class Examined:
    """What a tasks file says, as far as it can be read, and everything that is wrong with it."""

    backbone: BackboneConfig | None
    """As in :class:`TasksFile`; None where it cannot be used."""
    device: str
    """As in :class:`TasksFile`; ``auto`` where it cannot be used."""
    tasks: tuple[TaskConfig, ...]
    """The tasks that nothing is wrong with."""
    problems: tuple[ConfigError, ...]
    """In the order of the file."""
    watch: Path | None = None
    """As in :class:`TasksFile`."""
    defaults: Mapping[str, object] = field(default_factory=dict, hash=False)
    """As in :class:`TasksFile`."""

    def file(self, path: Path) -> TasksFile:
        """Return what can be used of the file, which names a backbone that can."""
        assert self.backbone is not None, "nothing can be made of tasks without a backbone"
        return TasksFile(path, self.backbone, self.device, self.tasks, self.watch, self.defaults)


def read_tasks(path: Path) -> TasksFile:
    """Read ``tasks.toml``.

    Data files are not opened, only checked to exist.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or a key is unknown, missing or of the wrong kind.
    """
    return _sound(examine_tasks(path), path)


def tasks_from_toml(text: str, path: Path) -> TasksFile:
    """Parse the text of a tasks file; ``path`` serves messages and relative data paths.

    Raises:
        ConfigError: as :func:`read_tasks`.
    """
    return _sound(_examined(text, path), path)


def examine_tasks(path: Path) -> Examined:
    """Read ``tasks.toml`` to its end whatever is wrong with it: :func:`read_tasks` stops at the first problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Examined(None, "auto", (), (ConfigError(f"{path}: cannot read the tasks file: {error}"),))
    return _examined(text, path)


def _sound(examined: Examined, path: Path) -> TasksFile:
    for problem in examined.problems:
        raise problem
    return examined.file(path)


def dropped_task(file: TasksFile, folder: Path, table: Mapping[str, object]) -> TaskConfig:
    """Return the task of a folder in the watched directory: named as the folder, under the file's ``[defaults]``.

    Args:
        file: the tasks file that watches.
        folder: the folder; paths in ``table`` are relative to it.
        table: keys of a ``[[task]]`` but ``name``.

    Raises:
        ConfigError: the first thing that is wrong with it, or it names code as its kind. Who may drop folders need not
            be who may run code here: only the tasks file names code, also for dropped folders, in ``[defaults]``.
    """
    _require_no_code(table, folder / "task.toml")
    problems = _Problems()
    task = _task({**table, "name": folder.name}, file.defaults, folder / "task.toml", 1, problems)
    for problem in problems:
        raise problem
    assert task is not None, "a task without a problem is one"
    return task


def _require_no_code(table: Mapping[str, object], path: Path) -> None:
    kind = table.get("kind")
    if isinstance(kind, str) and kind not in KINDS:
        raise ConfigError(
            f"{path}: kind: expected one of {', '.join(KINDS)}, got {values.show(kind)}: a dropped folder may name no "
            "code to run; a kind of your own is named in [defaults] of the tasks file, or in a [[task]] there"
        )


class _Problems(list[ConfigError]):
    """Errors met so far; the work goes on behind each."""

    def tried(self, read: Callable[[], _T], instead: _T) -> _T:
        """Return what ``read`` returns, or ``instead`` where it raises ConfigError, which is kept."""
        try:
            return read()
        except ConfigError as error:
            self.append(error)
            return instead


def _examined(text: str, path: Path) -> Examined:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return Examined(None, "auto", (), (ConfigError(f"{path}: not valid TOML: {error}"),))
    where = str(path)
    misplaced = [key for key in document if key in _READERS and key not in _TOP]
    problems = _Problems(values.unknown([key for key in document if key not in misplaced], _TOP, where))
    for key in misplaced:
        found_in = f"{where}: {key}"
        problems.append(ConfigError(f"{found_in}: expected it in a [[task]], or in [defaults] for all; move it there"))
    backbone = problems.tried(lambda: _backbone(document, path), None)
    device = problems.tried(
        lambda: values.one_of(document.get("device", "auto"), DEVICES, f"{where}: device"), DEVICES[0]
    )
    no_defaults: dict[str, object] = {}
    defaults = problems.tried(lambda: values.table(document.get("defaults", {}), f"{where}: [defaults]"), no_defaults)
    known = [key for key in _READERS if key not in _NOT_IN_DEFAULTS]
    problems.extend(values.unknown(defaults, known, f"{where}: [defaults]"))
    defaults = {key: value for key, value in defaults.items() if key in known}
    kind = defaults.get("kind")
    if isinstance(kind, str) and is_import_path(kind):
        defaults["kind"] = _beside(path, kind)  # not beside the task.toml of a dropped folder
    if "privacy" in document:
        defaults = {**defaults, "privacy": document["privacy"]}
    watch = problems.tried(lambda: _watched(document, path), None)
    entries = document.get("task", [])
    if not isinstance(entries, list) or not (entries or "watch" in document):
        problems.append(ConfigError(f"{where}: expected at least one [[task]] table, got {values.show(entries)}"))
        entries = []
    found = [_task(entry, defaults, path, number, problems) for number, entry in enumerate(entries, start=1)]
    tasks = tuple(task for task in found if task is not None)
    problems.extend(_twins(tasks, where))
    return Examined(backbone, device, tasks, tuple(problems), watch, defaults)


def _watched(document: Mapping[str, object], path: Path) -> Path | None:
    if "watch" not in document:
        return None
    directory = path.parent / values.text(document["watch"], f"{path}: watch")
    if not directory.is_dir():
        raise ConfigError(
            f"{path}: watch: expected a directory, got {directory}, which is none: make it, or take the key out"
        )
    return directory.resolve()


def _task(
    entry: object, defaults: Mapping[str, object], path: Path, number: int, problems: _Problems
) -> TaskConfig | None:
    """Build one task from its table and the defaults; None where something is wrong with it, told to ``problems``."""
    before = len(problems)
    table = problems.tried(lambda: values.table(entry, f"{path}: task number {number}"), None)
    if table is None:
        return None
    label = table.get("name", number)
    where = f"{path}: task {label!r}" if isinstance(label, str) else f"{path}: task number {label}"
    problems.extend(values.unknown(table, list(_READERS), where))
    merged = {key: value for key, value in {**defaults, **table}.items() if key in _READERS}
    for key in ("name", "kind", "train"):
        if key not in merged:
            problems.append(ConfigError(f'{where}: key {key!r} is missing; add {key} = "..." to this [[task]]'))
    if ("test" in table) == ("validation" in table) and ("test" in table or "validation" not in merged):
        problems.append(_one_test(where, both="test" in table))
    if "owner" in merged and "share_with" in merged:
        problems.append(ConfigError(f"{where}: expected either owner or share_with, got both: {ONE_OWNER}"))
    given: dict[str, Any] = {}
    for key, value in merged.items():
        given[key] = problems.tried(partial(_READERS[key], value, f"{where}: {key}"), None)
    for key in ("train", "test"):
        if given.get(key) is not None:
            given[key] = problems.tried(partial(_data_path, path.parent / given[key], f"{where}: {key}"), None)
    if is_import_path(given.get("kind") or ""):
        given["kind"] = _beside(path, given["kind"])
    if len(problems) > before:
        return None
    if "test" in given:
        given.pop("validation", None)  # from [defaults]
    task = TaskConfig(**given)
    problems.extend([*_exposed(task, where), *_two_sizes(task, where)])
    return None if len(problems) > before else task


def _beside(path: Path, kind: str) -> str:
    """Return a kind by import path with its folder, from that of the file ``path``."""
    return str((path.parent / kind).resolve())


def _one_test(where: str, both: bool) -> ConfigError:
    if both:
        return ConfigError(f"{where}: expected either test or validation, got both; take one out")
    return ConfigError(
        f"{where}: key 'test' is missing; add test = \"...\" to this [[task]], or validation = 0.2 to hold out a fifth "
        "of the training rows"
    )


def _data_path(path: Path, where: str) -> Path:
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names_beside(path), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; paths are relative to the directory of the tasks file"
        raise ConfigError(f"{where}: expected a data file, got {path}, which does not exist{hint}")
    return path.resolve()


def _names_beside(path: Path) -> list[str]:
    try:
        return [one.name for one in path.parent.iterdir()]
    except OSError:
        return []


def read_options(config: TaskConfig, readers: Mapping[str, values.Reader]) -> dict[str, Any]:
    """Return the ``[task.options]`` of a task, read by the readers of its kind.

    Raises:
        ConfigError: an option that the kind does not know, or a value that its reader refuses.
    """
    return values.read_keys(config.options, readers, f"task {config.name!r}: options of kind {config.kind!r}")


def _two_sizes(task: TaskConfig, where: str) -> list[ConfigError]:
    """Return an error where ``budget`` stands beside something that says already what is sent."""
    if task.budget is None:
        return []
    noisy = task.privacy is not None and task.privacy.mechanism == COEFFICIENTS
    beside = [("directions", task.directions is not None), (f"privacy mechanism {COEFFICIENTS!r}", noisy)]
    return [
        ConfigError(f"{where}: budget: expected none beside {name}, which says what is sent already; take one out")
        for name, given in beside
        if given
    ]


def _exposed(task: TaskConfig, where: str) -> list[ConfigError]:
    """Return an error for each thing that would leave without noise, or that a mechanism cannot be had with."""
    if task.privacy is None:
        return []
    if task.privacy.mechanism != COEFFICIENTS:
        return [
            ConfigError(
                f"{where}: {key}: expected {expected} with privacy mechanism {SAMPLES!r}, got {got}: it works on "
                f"gradients of single rows, all passes of them; take {key} out; accumulate saves memory"
            )
            for key, expected, got, wrong in (
                ("precision", "fp32 or auto", task.precision, task.precision == "bf16"),
                ("checkpointing", "false", "true", task.checkpointing),
                ("budget", "none", task.budget, task.budget is not None),
                ("patience", "none", task.patience, task.patience is not None),
            )
            if wrong
        ]
    errors = []
    if task.directions:
        errors.append(
            ConfigError(
                f"{where}: directions: expected 0 with privacy mechanism {COEFFICIENTS!r}, got {task.directions}: free "
                'directions leave without noise; leave the key out, or use mechanism = "dp-sgd"'
            )
        )
    if task.share_head:
        errors.append(
            ConfigError(
                f"{where}: share_head: expected false with privacy mechanism {COEFFICIENTS!r}, got true: a head leaves "
                'without noise; keep it private, or use mechanism = "dp-sgd"'
            )
        )
    return errors


def _backbone(document: Mapping[str, object], path: Path) -> BackboneConfig:
    if "backbone" not in document:
        raise ConfigError(f"{path}: key 'backbone' is missing; add backbone = \"...\" at the top of the file")
    return read_backbone(document["backbone"], path.parent, f"{path}: backbone")


def _twins(tasks: tuple[TaskConfig, ...], where: str) -> list[ConfigError]:
    """Return an error for each task whose name was used before."""
    seen: set[str] = set()
    errors = []
    for task in tasks:
        if task.name in seen:
            errors.append(ConfigError(f"{where}: task {task.name!r}: name: expected a name used once, got it twice"))
        seen.add(task.name)
    return errors


def _columns(value: object, where: str) -> dict[str, str]:
    table = values.table(value, where)
    return {key: values.text(column, f"{where}: {key}") for key, column in table.items()}


def _name(value: object, where: str) -> str:
    try:
        return check_name(values.text(value, where), "task name")
    except TaskNameError as error:
        raise ConfigError(f"{where}: {error}") from error


def _kind(value: object, where: str) -> str:
    if isinstance(value, str) and is_import_path(value):
        return value
    return values.one_of(value, (*KINDS, "module:object"), where)


_READERS: Mapping[str, values.Reader] = {
    "name": _name,
    "kind": _kind,
    "train": values.text,
    "test": values.text,
    "validation": values.number(0.01, 0.9),
    "columns": _columns,
    "options": values.table,
    "epochs": values.integer(1, 10_000),
    "batch_size": values.integer(1, 65_536),
    "learning_rate": values.number(0, 1, above=True),
    "directions": values.integer(0, 64),
    "pseudo_rank": values.integer(0, 64),
    "seed": values.integer(0, 2**63 - 1),
    "rows": values.integer(1, 2**53),
    "test_rows": values.integer(1, 2**53),
    "max_length": values.integer(4, 8192),
    "share_head": values.boolean,
    "share_with": read_share_with,
    "owner": read_organisation,
    "refit": values.boolean,
    "pace": values.number(0, 60),
    "precision": lambda value, where: values.one_of(value, PRECISIONS, where),
    "accumulate": values.integer(1, 65_536),
    "checkpointing": values.boolean,
    "budget": values.number(0.01, 1),
    "patience": values.integer(1, 1000),
    "privacy": read_privacy,
}
