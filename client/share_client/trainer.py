"""The seam between the session and training: what a session needs to know of data and backbone.

The real one, :class:`BackboneTrainer`, wraps :mod:`share_client.training`; tests and simulations may pass another.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from share_client.data.content import content_hash, stamps
from share_client.kind_names import is_import_path
from share_client.privacy_table import PrivacyConfig
from share_client.tasks_file import TaskConfig, TasksFile, read_tasks
from share_client.watched import Settling, dropped_tasks
from share_core.errors import ConfigError
from share_core.privacy import COEFFICIENTS, SAMPLES, Declaration
from share_core.space import columns_of, task_adapter, update_adapter
from share_core.types import Adapter, SharedHead, Space, Update

if TYPE_CHECKING:
    from share_client.training import Backbone, PreparedTask, Progress, TrainingOptions, TrainResult

RICHER = 1.5
"""How many times the share of its last training the newest bases must capture for a refit (docs/adr/0019)."""


@dataclass(frozen=True)
class LocalTask:
    """One task a session may work on."""

    name: str
    """Name inside the organisation."""
    content_hash: str
    """Hash of its data, of what is learned of it and how it is read (kind, columns, options) and of its ``[privacy]``
    table: who changes one of them asks for another training."""
    config: TaskConfig | None = None
    """Its entry in tasks.toml; None for trainers that read no file."""
    is_whole: bool = True
    """False while its files are still being written: it has no hash yet and is left alone, but the session waits."""

    dropped: bool = False
    """Whether it came as a folder: rows that cannot be read are then a refusal of the task, and end nothing."""
    made_by: str = ""
    """What trains it besides its settings: backbone, device and the code of a kind of the client's own."""

    @property
    def attempt(self) -> str:
        """Hash of its data and of every setting: what was refused is tried again once one of them has changed."""
        if self.config is None:
            return self.content_hash
        return hashlib.sha256(f"{self.content_hash} {self.config} {self.made_by}".encode()).hexdigest()

    @property
    def privacy(self) -> PrivacyConfig | None:
        """Its ``[privacy]`` table, or None."""
        return None if self.config is None else self.config.privacy

    @property
    def only_coefficients(self) -> bool:
        """Whether nothing but coefficients may leave, so that there must be bases before it can be trained."""
        return self.privacy is not None and self.privacy.mechanism == COEFFICIENTS

    @property
    def owner(self) -> str:
        """The organisation whose task it is, where the tasks file names one; empty: this client's own."""
        return "" if self.config is None else self.config.owner

    @property
    def reports(self) -> bool:
        """Whether its evaluations are reported to the hub, which takes them from the task's owner only."""
        return not self.owner and (self.privacy is None or self.privacy.report_metrics)


@dataclass(frozen=True)
class Trained:
    """What training one task gave."""

    update: Update
    """What is submitted."""
    head: Mapping[str, Tensor]
    """The private head."""
    loss: float
    """Last training loss."""
    steps: int
    """Optimiser steps."""
    seconds: float
    """Time the training took."""
    rows: int
    """Training rows."""
    trained_numbers: int = 0
    """Trained parameters."""
    declared: Declaration | None = None
    """Clipping and noise in the update."""
    columns: int = 0
    """Basis vectors that the training could use, over all sites and both sides, its own new directions included."""
    plan: Mapping[str, str] = field(default_factory=dict)
    """By site: rank of the coefficients, number of new directions, and why."""
    captured: float = 0.0
    """Share of the gradient's energy left at the end that coefficients in those bases could follow; 0: not measured."""
    schema_sha256: str = ""
    """Digest of the label schema; empty where the update holds no head and the task is not shared."""


@dataclass(frozen=True)
class Refit:
    """What training coefficients again in newer bases gave."""

    captured: float
    """Share of the gradient's energy that coefficients in the newer bases can follow; 0 where it was not asked."""
    trained: Trained | None = None
    """The new coefficients and head; None: the newer bases capture too little more for a try."""
    before: float = 0.0
    """Metric of what is stored, on the private test rows."""
    after: float = 0.0
    """Metric of the new one, on the same rows."""
    noise: float = 0.0
    """Standard error of their difference."""


@dataclass(frozen=True)
class Measured:
    """One evaluation."""

    metric: str
    """``accuracy``."""
    value: float
    """A fraction."""
    rows: int
    """Test rows."""


@dataclass(frozen=True)
class Step:
    """How far a training is."""

    epoch: int
    """From 1."""
    step: int
    """Steps taken."""
    steps: int
    """Steps in all."""
    loss: float
    """Loss of late."""


class Trainer(Protocol):
    """Data and backbone of one client."""

    def weights(self) -> Mapping[str, Tensor]:
        """Return the frozen weights by site name, to compare with the space."""
        ...

    def tasks(self) -> Sequence[LocalTask]:
        """Return the tasks in order of work; read anew at each call.

        Raises:
            ConfigError: the tasks file or a data file cannot be used.
        """
        ...

    def rows(self, task: LocalTask) -> int:
        """Return the number of training rows."""
        ...

    def train(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        progress: Callable[[Step], None],
        shared: SharedHead | None = None,
    ) -> Trained:
        """Train one task in the coordinates of ``space``, from the ``shared`` head if it is one for the same labels."""
        ...

    def evaluate(self, task: LocalTask, adapter: Adapter, head: Mapping[str, Tensor]) -> Measured:
        """Measure one task's adapter and head on the private test rows."""
        ...

    def refit(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        head: Mapping[str, Tensor],
        before: float | None,
        progress: Callable[[Step], None],
    ) -> Refit:
        """Train the stored coefficients of one task again in ``space``, without new directions, and compare.

        ``before`` is the captured share of its last training (:attr:`Trained.captured`): without a clearly larger
        one now nothing is trained. None: train in any case, and look at no gradient.
        """
        ...


class BackboneTrainer:
    """Trains tasks of a ``tasks.toml`` on its backbone, which is loaded once, when it is first needed."""

    def __init__(
        self, path: Path, settling: Settling | None = None, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """Read ``path``, a tasks file.

        Args:
            path: the file.
            settling: leaves out tasks whose files are still being written; None takes everything as it is.
            tell: called once with what keeps a dropped folder from being a task.
        """
        self._path = path
        self._settling = settling
        self._tell = tell
        self._told: frozenset[str] = frozenset()
        self._loaded: Backbone | None = None
        self._words = ""
        self._codes: dict[str, str] = {}
        self._hashes: dict[tuple[tuple[str, int, int], ...], str] = {}
        self._prepared: dict[str, tuple[TaskConfig, str, PreparedTask]] = {}

    def weights(self) -> Mapping[str, Tensor]:
        """Return the frozen weights by site name."""
        return self._backbone().site_weights()

    def _backbone(self) -> Backbone:
        """Load the backbone when it is first needed: most leases of an idle client never need it."""
        if self._loaded is None:
            from share_client.training import load_backbone

            file = read_tasks(self._path)
            self._loaded = load_backbone(file.backbone, file.device)
            self._words = f"{file.backbone} on {self._loaded.device}"
        return self._loaded

    def _backbone_in_words(self, file: TasksFile) -> str:
        """Return backbone and device: those that are loaded, which stay until a restart, or that would be."""
        from share_client.backbones.backbone import choose_device

        return self._words or f"{file.backbone} on {choose_device(file.device)}"

    def _code(self, kind: str) -> str:
        """Return a hash of the module of a kind of the client's own, as it is when it is first asked for."""
        if kind not in self._codes:
            self._codes[kind] = code_hash(kind) if is_import_path(kind) else ""
        return self._codes[kind]

    def tasks(self) -> Sequence[LocalTask]:
        """Return the tasks of the file as it is now; a changed backbone takes a restart."""
        file: TasksFile = read_tasks(self._path)
        settling = self._settling
        dropped = dropped_tasks(file, settling)
        remarks, from_folders = [*dropped.remarks], []
        for task in dropped.tasks:
            try:
                from_folders.append(replace(self._local(task, True, file), dropped=True))
            except ConfigError as error:  # a file that may not be read disturbs no other task
                remarks.append(str(error))
        for remark in sorted(set(remarks) - self._told):
            self._tell(remark)
        self._told = frozenset(remarks)
        tasks = [*file.tasks, *dropped.tasks]
        if any(task.privacy is not None and task.privacy.mechanism == SAMPLES for task in tasks):
            _require_packages(str(self._path))
        return [
            *(
                self._local(task, settling is None or settling.is_whole(*_data(task), named=True), file)
                for task in file.tasks
            ),
            *from_folders,
            *(LocalTask(name, "", is_whole=False) for name in dropped.filling),
        ]

    def _local(self, task: TaskConfig, is_whole: bool, file: TasksFile) -> LocalTask:
        content_hash = self._hash(task, file) if is_whole else ""
        made_by = " ".join([self._backbone_in_words(file), self._code(task.kind)])
        return LocalTask(task.name, content_hash, task, is_whole, made_by=made_by)

    def rows(self, task: LocalTask) -> int:
        """Return the number of training rows."""
        return self._prepare(task).train_rows

    def train(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        progress: Callable[[Step], None],
        shared: SharedHead | None = None,
    ) -> Trained:
        """Train one task in the coordinates of ``space``, from the ``shared`` head if it is one for the same labels."""
        from share_client.training import TrainingOptions, declare, train_in_space

        prepared = self._prepare(task)
        options = TrainingOptions.of(prepared.config)
        declared = declare(prepared.config, prepared.train_rows)
        forward = _forward(progress)
        head = self._start_head(prepared, shared)
        result = train_in_space(self._backbone(), prepared, space, task_id, options, forward, head, declared)
        return self._trained(prepared, space, options, result)

    def _start_head(self, prepared: PreparedTask, shared: SharedHead | None) -> Mapping[str, Tensor] | None:
        """Return the tensors of a shared head if it is one for the same labels and of the same form."""
        from share_client.training import fits_head

        if shared is None or shared.schema_sha256 != prepared.schema_sha256:
            return None
        return shared.tensors if fits_head(self._backbone(), prepared, shared.tensors) else None

    def refit(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        head: Mapping[str, Tensor],
        before: float | None,
        progress: Callable[[Step], None],
    ) -> Refit:
        """Train the stored coefficients of one task again in ``space``, without new directions, and compare."""
        from share_client.training import TrainingOptions, declare, refit

        prepared, backbone = self._prepare(task), self._backbone()
        options = TrainingOptions.of(prepared.config)
        stored, captured = task_adapter(space, task_id), 0.0
        if before is not None:
            gradients = refit.gradients_at(backbone, prepared, stored, head, tuple(space.bases), options)
            captured = refit.captured_share(gradients, space.bases)
            if captured < RICHER * before:
                return Refit(captured)
        declared = declare(prepared.config, prepared.train_rows)
        result = refit.refit_in_space(
            backbone, prepared, space, task_id, options, _forward(progress), head, declared=declared
        )
        fresh = update_adapter(result.update, space.bases)
        seen = refit.compare(backbone, prepared, (stored, head), (fresh, result.head))
        trained = self._trained(prepared, space, options, result)
        return Refit(captured, trained, before=seen.before, after=seen.after, noise=seen.noise)

    def _trained(self, prepared: PreparedTask, space: Space, options: TrainingOptions, result: TrainResult) -> Trained:
        """Return a result with what a later refit, if it is asked for, is compared with; no gradient under noise."""
        from share_client.training import refit

        usable = refit.usable_bases(space.bases, result.update)
        captured = 0.0
        if prepared.config.refit and result.declared is None:
            adapter = update_adapter(result.update, space.bases)
            with suppress(ConfigError, RuntimeError, MemoryError):  # what was trained is not to be lost by a look at it
                gradients = refit.gradients_at(self._backbone(), prepared, adapter, result.head, tuple(usable), options)
                captured = refit.captured_share(gradients, usable)
        return Trained(
            update=result.update,
            head=result.head,
            loss=result.loss,
            steps=result.steps,
            seconds=result.seconds,
            rows=prepared.train_rows,
            trained_numbers=result.trained_numbers,
            declared=result.declared,
            columns=columns_of(usable),
            captured=captured,
            plan={site: str(one) for site, one in result.plan.items()},
            schema_sha256=prepared.schema_sha256 if result.update.head or prepared.config.is_shared else "",
        )

    def evaluate(self, task: LocalTask, adapter: Adapter, head: Mapping[str, Tensor]) -> Measured:
        """Measure one task's adapter and head on the private test rows."""
        from share_client.training import evaluate

        result = evaluate(self._backbone(), self._prepare(task), adapter, head)
        return Measured(metric=result.metric, value=result.value, rows=result.rows)

    def _hash(self, task: TaskConfig, file: TasksFile) -> str:
        """Hash the data files, again only when size or time of one has changed, and what is to be made of them."""
        paths = _data(task)
        key = tuple(stamp for path in paths for stamp in stamps(path))
        if key not in self._hashes:
            self._hashes[key] = content_hash(*paths)
        reading: list[object] = [task.validation, dict(task.columns), dict(task.options)]
        if task.kind != _usual_kind(file):
            reading.append(_portable(task.kind, file))
        if task.owner:
            reading.append(["owner", task.owner])  # the same data, for another task
        if task.privacy is None and not any(reading):
            return self._hashes[key]
        return hashlib.sha256(f"{self._hashes[key]} {task.privacy} {reading}".encode()).hexdigest()

    def _prepare(self, task: LocalTask) -> PreparedTask:
        """Read and tokenise a task's files, once for each content and configuration."""
        from share_client.training import prepare_task

        assert task.config is not None, "a task of a file has a configuration"
        known = self._prepared.get(task.name)
        if known is None or known[:2] != (task.config, task.content_hash):
            known = (task.config, task.content_hash, prepare_task(task.config, self._backbone()))
            self._prepared[task.name] = known
        return known[2]


def code_hash(kind: str) -> str:
    """Return the SHA-256 of the module, or of the package's files, of ``FOLDER/module:object``.

    It is empty where there is none in the folder: a kind that Python finds elsewhere is not looked for.
    """
    path = Path(kind.partition(":")[0])
    module = path.parent / path.name.partition(".")[0]
    files = sorted(module.rglob("*.py")) if module.is_dir() else [module.with_suffix(".py")]
    return content_hash(*files) if all(file.is_file() for file in files) else ""


def _forward(progress: Callable[[Step], None]) -> Callable[[Progress], None]:
    """Return a callback for the training loop that tells ``progress``."""
    return lambda seen: progress(Step(epoch=seen.epoch, step=seen.step, steps=seen.steps, loss=seen.loss))


def _usual_kind(file: TasksFile) -> str:
    """Return the kind that is not written into hashes: the only one there was on such a backbone when there were two.

    So what clients have on their disks from then still says that these tasks are trained.
    """
    return "image-classification" if file.backbone.model == "digits-vit" else "text-classification"


def _portable(kind: str, file: TasksFile) -> str:
    """Return a kind without the place of the tasks file, which may be moved."""
    return os.path.relpath(kind, file.path.parent.resolve()) if is_import_path(kind) else kind


def _data(task: TaskConfig) -> list[Path]:
    return [task.train] if task.test is None else [task.train, task.test]


def _require_packages(where: str) -> None:
    """Refuse a tasks file that asks for DP-SGD where it cannot be done: it must not count as a refusal of the task.

    Raises:
        ConfigError: naming the packages and how to install them.
    """
    missing = [name for name in ("opacus", "dp_accounting") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{where}: [privacy] needs {' and '.join(missing)}: pip install 'fedshare[privacy]'")
