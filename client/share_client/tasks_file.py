"""The file ``tasks.toml``: which backbone a client trains on and which tasks it owns.

::

    backbone = "digits-vit"        # or "minilm", or the path of a Hugging Face model directory
    device = "auto"                # auto | cpu | cuda

    [defaults]                     # any key of [[task]] but name, train and test
    epochs = 6

    [[task]]
    name = "rot90"
    kind = "image-classification"  # or "text-classification"
    train = "rot90/train.npz"      # relative to the directory of tasks.toml
    test = "rot90/test.npz"

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
from dataclasses import dataclass
from pathlib import Path

from share_core.errors import ConfigError, TaskNameError
from share_core.names import check_name
from share_core.privacy import COEFFICIENTS, SAMPLES

KINDS = ("image-classification", "text-classification")
DEVICES = ("auto", "cpu", "cuda")
_NOT_IN_DEFAULTS = ("name", "train", "test", "privacy")


@dataclass(frozen=True)
class PrivacyConfig:
    """A ``[privacy]`` table: what an update may tell of the data it was trained on."""

    mechanism: str = SAMPLES
    """``dp-sgd`` hides single rows, ``coefficients`` the whole data set of this client."""
    epsilon: float | None = None
    """What one training may spend; the noise is computed from it. Either this or :attr:`noise_multiplier`."""
    noise_multiplier: float | None = None
    """Noise in units of the norm that is clipped to."""
    max_grad_norm: float = 1.0
    """Norm to which the gradient of every row is clipped. For ``dp-sgd``."""
    clip: float = 1.0
    """Norm to which all coefficients together are clipped. For ``coefficients``."""
    delta: float | None = None
    """Probability with which epsilon may not hold. None: 1 / (10 rows) for ``dp-sgd``, 1e-6 for ``coefficients``."""
    budget: float | None = None
    """What all trainings of the task together may spend. None: :attr:`epsilon`, or no limit where that is not set."""
    report_metrics: bool = False
    """Whether evaluations on the test rows are reported to the hub. No noise is added to them."""

    @property
    def limit(self) -> float | None:
        """The budget in force, or None."""
        return self.epsilon if self.budget is None else self.budget


@dataclass(frozen=True)
class TaskConfig:
    """One ``[[task]]``: a private data set to learn, and how."""

    name: str
    """Name inside the member's organisation; the task id is ``organisation/name``."""
    kind: str
    """``image-classification`` or ``text-classification``."""
    train: Path
    """Absolute path of the training rows: ``.npz``, ``.jsonl`` or ``.jsonl.gz``."""
    test: Path
    """Absolute path of the test rows, in the same format. Used for evaluation only."""
    epochs: int = 3
    """Passes over the training rows."""
    batch_size: int = 32
    """Rows in one step."""
    learning_rate: float = 2e-3
    """Adam's step for a LoRA factor; the other parameters' steps are derived from it."""
    directions: int | None = None
    """Free directions phi added to the subspace at each site. None: the trainer's default, more for a first task."""
    pseudo_rank: int | None = None
    """Rank p of the core trained at each site. None: the trainer's default."""
    seed: int = 0
    """Seed of initialisation and of the order of the rows."""
    rows: int | None = None
    """Use only the first so many training rows. None: all."""
    test_rows: int | None = None
    """Use only the first so many test rows. None: all."""
    max_length: int = 64
    """Longest text in tokens; what is beyond is cut. Without meaning for images."""
    share_head: bool = False
    """Whether the head's tensors leave with the update."""
    refit: bool = True
    """Whether coefficients are learned again when the subspace has grown, see :mod:`share_client.refits`."""
    pace: float = 0.0
    """Seconds slept after each step, to simulate slow hardware."""
    privacy: PrivacyConfig | None = None
    """Clipping and noise. None: updates carry none."""


@dataclass(frozen=True)
class TasksFile:
    """A whole ``tasks.toml``."""

    path: Path
    """Where it was read."""
    backbone: str
    """``digits-vit``, ``minilm`` or the absolute path of a Hugging Face model directory."""
    device: str
    """``auto``, ``cpu`` or ``cuda``."""
    tasks: tuple[TaskConfig, ...]
    """In the order of the file, which is the order of work."""


def read_tasks(path: Path) -> TasksFile:
    """Read ``tasks.toml``.

    Data files are not opened, only checked to exist.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or a key is unknown, missing or of the wrong kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the tasks file: {error}") from error
    return tasks_from_toml(text, path)


def tasks_from_toml(text: str, path: Path) -> TasksFile:
    """Parse the text of a tasks file; ``path`` serves messages and relative data paths.

    Raises:
        ConfigError: as :func:`read_tasks`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    where = str(path)
    _refuse_unknown(document, ("backbone", "device", "defaults", "privacy", "task"), where)
    backbone = _need(document, "backbone", where, _text)
    device = _one_of(document.get("device", "auto"), DEVICES, f"{where}: device")
    defaults = _table(document.get("defaults", {}), f"{where}: [defaults]")
    _refuse_unknown(defaults, [key for key in _READERS if key not in _NOT_IN_DEFAULTS], f"{where}: [defaults]")
    if "privacy" in document:
        defaults = {**defaults, "privacy": document["privacy"]}
    entries = document.get("task", [])
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: expected at least one [[task]] table, got {_show(entries)}")
    tasks = tuple(_task(entry, defaults, path, number) for number, entry in enumerate(entries, start=1))
    _refuse_twins(tasks, where)
    return TasksFile(path=path, backbone=_backbone(backbone, path), device=device, tasks=tasks)


def _task(entry: object, defaults: Mapping[str, object], path: Path, number: int) -> TaskConfig:
    """Build one task from its table and the defaults."""
    table = _table(entry, f"{path}: task number {number}")
    label = table.get("name", number)
    where = f"{path}: task {label!r}" if isinstance(label, str) else f"{path}: task number {label}"
    _refuse_unknown(table, list(_READERS), where)
    merged = {**defaults, **table}
    for key in ("name", "kind", "train", "test"):
        if key not in merged:
            raise ConfigError(f'{where}: key {key!r} is missing; add {key} = "..." to this [[task]]')
    values = {key: _READERS[key](value, f"{where}: {key}") for key, value in merged.items()}
    for key in ("train", "test"):
        file = path.parent / str(values[key])
        if not file.is_file():
            raise ConfigError(f"{where}: {key}: expected a data file, got {file}, which does not exist")
        values[key] = file.resolve()
    task = TaskConfig(**values)  # type: ignore[arg-type]
    _refuse_exposed(task, where)
    return task


def _refuse_exposed(task: TaskConfig, where: str) -> None:
    """Refuse what would leave beside noisy coefficients without any noise.

    Raises:
        ConfigError: free directions or a shared head together with noise on coefficients.
    """
    if task.privacy is None or task.privacy.mechanism != COEFFICIENTS:
        return
    if task.directions:
        raise ConfigError(
            f"{where}: directions: expected 0 with privacy mechanism {COEFFICIENTS!r}, got {task.directions}: free "
            'directions leave without noise; leave the key out, or use mechanism = "dp-sgd"'
        )
    if task.share_head:
        raise ConfigError(
            f"{where}: share_head: expected false with privacy mechanism {COEFFICIENTS!r}, got true: a head leaves "
            'without noise; keep it private, or use mechanism = "dp-sgd"'
        )


def _privacy(value: object, where: str) -> PrivacyConfig:
    table = _table(value, where)
    _refuse_unknown(table, list(_PRIVACY_READERS), where)
    values = {key: _PRIVACY_READERS[key](given, f"{where}: {key}") for key, given in table.items()}
    privacy = PrivacyConfig(**values)  # type: ignore[arg-type]
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        got = "neither" if privacy.epsilon is None else "both"
        raise ConfigError(f"{where}: expected either epsilon or noise_multiplier, got {got}")
    other = {SAMPLES: "clip", COEFFICIENTS: "max_grad_norm"}[privacy.mechanism]
    if other in table:
        raise ConfigError(f"{where}: {other}: has no meaning for mechanism {privacy.mechanism!r}: take it out")
    return privacy


def _backbone(name: str, path: Path) -> str:
    """Turn a relative model directory into an absolute one; packaged names stay names."""
    if name in ("digits-vit", "minilm"):
        return name
    directory = path.parent / name
    if not directory.is_dir():
        raise ConfigError(
            f'{path}: backbone: expected "digits-vit", "minilm" or the path of a model directory, got {name!r}'
        )
    return str(directory.resolve())


def _refuse_twins(tasks: tuple[TaskConfig, ...], where: str) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ConfigError(f"{where}: task {task.name!r}: name: expected a name used once, got it twice")
        seen.add(task.name)


def _refuse_unknown(table: Mapping[str, object], known: list[str] | tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown key {key!r}: expected one of {', '.join(known)}{hint}")


def _need(table: Mapping[str, object], key: str, where: str, read: Callable[[object, str], object]) -> str:
    if key not in table:
        raise ConfigError(f'{where}: key {key!r} is missing; add {key} = "..." at the top of the file')
    return str(read(table[key], f"{where}: {key}"))


def _show(value: object) -> str:
    return f"{repr(value)[:80]} ({type(value).__name__})"


def _table(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a table, got {_show(value)}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: expected a non-empty string, got {_show(value)}")
    return value


def _name(value: object, where: str) -> str:
    try:
        return check_name(_text(value, where), "task name")
    except TaskNameError as error:
        raise ConfigError(f"{where}: {error}") from error


def _one_of(value: object, allowed: tuple[str, ...], where: str) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{where}: expected one of {', '.join(allowed)}, got {_show(value)}")
    return value


def _kind(value: object, where: str) -> str:
    return _one_of(value, KINDS, where)


def _bool(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: expected true or false, got {_show(value)}")
    return value


def _integer(low: int, high: int) -> Callable[[object, str], int]:
    """Return a reader of integers from ``low`` to ``high``."""

    def read(value: object, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{where}: expected an integer from {low} to {high}, got {_show(value)}")
        return value

    return read


def _number(low: float, high: float, above: bool = False) -> Callable[[object, str], float]:
    """Return a reader of finite numbers from ``low`` (excluded if ``above``) to ``high``."""
    bound = "above" if above else "from"

    def read(value: object, where: str) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not low <= value <= high or (above and value == low):  # type: ignore[operator]
            raise ConfigError(f"{where}: expected a number {bound} {low:g} to {high:g}, got {_show(value)}")
        return float(value)  # type: ignore[arg-type]

    return read


_PRIVACY_READERS: Mapping[str, Callable[[object, str], object]] = {
    "mechanism": lambda value, where: _one_of(value, (SAMPLES, COEFFICIENTS), where),
    "epsilon": _number(0, 1e6, above=True),
    "noise_multiplier": _number(1e-3, 1e6),
    "max_grad_norm": _number(0, 1e6, above=True),
    "clip": _number(0, 1e6, above=True),
    "delta": _number(1e-30, 0.1),
    "budget": _number(0, 1e9, above=True),
    "report_metrics": _bool,
}
_READERS: Mapping[str, Callable[[object, str], object]] = {
    "name": _name,
    "kind": _kind,
    "train": _text,
    "test": _text,
    "epochs": _integer(1, 10_000),
    "batch_size": _integer(1, 65_536),
    "learning_rate": _number(0, 1, above=True),
    "directions": _integer(0, 64),
    "pseudo_rank": _integer(0, 64),
    "seed": _integer(0, 2**63 - 1),
    "rows": _integer(1, 2**53),
    "test_rows": _integer(1, 2**53),
    "max_length": _integer(4, 8192),
    "share_head": _bool,
    "refit": _bool,
    "pace": _number(0, 60),
    "privacy": _privacy,
}
