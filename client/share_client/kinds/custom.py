"""Kinds that the client's own code defines: ``kind = "module:object"`` in ``tasks.toml``.

The module is looked for in the directory of ``tasks.toml`` first, or in a folder below it: ``folder/module:object``.
Its code runs in the client with all the client's rights, as the file that names it is the client's own.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_client.backbones import Backbone
from share_client.imports import import_object
from share_client.kinds.kind import Kind, PreparedTask
from share_client.tasks_file import TaskConfig
from share_core.errors import ConfigError, FedshareError

_NEAR = 1e-3
"""Largest relative difference between the loss of two rows and the mean of theirs: batches may round differently."""


def load_custom(path: str) -> Kind:
    """Return the kind that ``FOLDER/module:object`` names: a subclass of :class:`Kind`, or an object of one.

    The module is looked for in the folder first, and then where Python looks.

    Raises:
        ConfigError: it cannot be imported, is no kind, or lacks a method, ``name`` or ``metric``.
    """
    where = f"kind {path!r}"
    found = import_object(Path(path).name, where, Path(path).parent)
    if isinstance(found, type) and issubclass(found, Kind):
        try:
            found = found()
        except Exception as error:
            raise ConfigError(
                f"{where}: expected a class that can be made without arguments, got {type(error).__name__}: {error}"
            ) from error
    if not isinstance(found, Kind):
        raise ConfigError(
            f"{where}: expected a subclass of share_client.kinds.Kind or an object of one, got {type(found).__name__}"
        )
    for name in ("name", "metric"):
        if not isinstance(getattr(found, name, None), str):
            raise ConfigError(f'{where}: {name}: expected a string, got none; add {name} = "..." to the class')
    return found


def prepare_custom(kind: Kind, config: TaskConfig, backbone: Backbone) -> PreparedTask:
    """Prepare a task by a custom kind, and see on two rows that all its parts fit together.

    Raises:
        ConfigError: naming the part that fails, and of an exception its class and line only: its words may be rows.
    """
    where = f"task {config.name!r}: kind {config.kind!r}"
    with _telling(where, "prepare", kind):
        task: Any = kind.prepare(config, backbone)
    if not isinstance(task, PreparedTask):
        raise _misfit(where, "prepare", "a share_client.kinds.PreparedTask", type(task).__name__)
    for name, rows in (("train", task.train), ("test", task.test)):
        if len(rows) < 1 or len(rows.lengths()) != len(rows):
            raise _misfit(where, f"{name}.lengths", "one number for each row and at least one row", "another count")
    with torch.random.fork_rng(devices=[]):
        _check_rows(where, task, backbone)
    return task


def _check_rows(where: str, task: PreparedTask, backbone: Backbone) -> None:
    """Run the first rows through head, outputs, loss, judge and score."""
    with _telling(where, "head", task.kind):
        head = task.kind.head(task, backbone.width).to(backbone.device)

    def pass_of(rows: list[int]) -> tuple[Tensor, Tensor]:
        with _telling(where, "batch", task.kind):
            inputs, targets = task.train.batch(rows, backbone.device)
        with _telling(where, "outputs", task.kind):
            outputs = task.kind.outputs(backbone, head, inputs)
        with _telling(where, "loss", task.kind):
            loss = task.kind.loss(outputs, targets)
        if not isinstance(loss, Tensor) or loss.ndim or not bool(torch.isfinite(loss)):
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise _misfit(where, "loss", "a finite scalar tensor", f"{shape}")
        with _telling(where, "judge", task.kind):
            judged = task.kind.judge(outputs, targets)
        if not isinstance(judged, Tensor) or judged.ndim != 2 or len(judged) != len(rows):
            shape = tuple(judged.shape) if isinstance(judged, Tensor) else type(judged).__name__
            raise _misfit(where, "judge", f"a tensor ({len(rows)}, n) for {len(rows)} rows", f"{shape}")
        return loss, judged

    rows = list(range(min(2, task.train_rows)))
    with torch.inference_mode():
        loss, judged = pass_of(rows)
        alone = torch.stack([pass_of([row])[0] for row in rows]).mean()
        if not torch.allclose(loss.double(), alone.double(), rtol=_NEAR, atol=_NEAR):
            raise _misfit(
                where, "loss", "the mean of the losses of the rows, each of its own row alone", "another value"
            )
        with _telling(where, "score", task.kind):
            score: Any = task.kind.score(judged.cpu())
    if not isinstance(score, float):
        raise _misfit(where, "score", "a float", type(score).__name__)


def _misfit(where: str, part: str, expected: str, got: str) -> ConfigError:
    return ConfigError(f"{where}: {part}: expected {expected}, got {got}; docs/kinds.md says what each part is")


@contextmanager
def _telling(where: str, part: str, kind: Kind) -> Iterator[None]:
    """Turn an exception of the client's code into an error that names its class and line, and none of its words."""
    try:
        yield
    except FedshareError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = getattr(sys.modules.get(type(kind).__module__), "__file__", None)
        # The kind's own line, not one of PyTorch's that it led to; where it has none, the deepest there is.
        last = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        raise ConfigError(
            f"{where}: {part} failed with {type(error).__name__} at {Path(last.filename).name}, line {last.lineno}"
        ) from None
