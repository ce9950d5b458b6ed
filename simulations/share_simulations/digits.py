"""The quickstart: three organisations with private views of scikit-learn's 1,797 handwritten digits.

Rows before ``FIRST_TASK_ROW`` belong to the pretraining of the packaged backbone and are never used here. Of
the rest, the last ``TEST_ROWS`` are the test rows of every task; the others are dealt to the clients, so that
no two clients train on the same image. A task is a way of looking at digits: some classes only, rotated,
mirrored, inverted, noisy or transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from share_client.backbones.pretrain_digits import FIRST_TASK_ROW
from share_core.errors import ConfigError
from share_simulations.scenario import Arrival, ClientPlan, Scenario, TaskPlan, TomlValue, client_folder

TEST_ROWS = 400
"""Rows at the end that every task is tested on."""

LEARNING_RATE = 5e-3
"""More than the trainer's default: a client has less than three hundred rows."""

Images = NDArray[np.float32]
"""(n, 8, 8), values from 0 to 1."""
Labels = NDArray[np.int64]
"""(n,)"""
View = Callable[[Images, np.random.Generator], Images]


@dataclass(frozen=True)
class DigitTask:
    """One way of looking at digits."""

    name: str
    view: View
    classes: tuple[int, ...] = tuple(range(10))


@dataclass(frozen=True)
class DigitClient:
    """One organisation of the quickstart."""

    organisation: str
    pace: float
    """Seconds its machine takes longer for each step."""
    tasks: tuple[DigitTask, ...]


def _same(x: Images, _: np.random.Generator) -> Images:
    return x


def _noisy(x: Images, random: np.random.Generator) -> Images:
    noisy = x + random.normal(0.0, 0.25, x.shape).astype(np.float32)
    return np.clip(noisy, 0.0, 1.0)


def _rotated(quarters: int) -> View:
    return lambda x, _: np.ascontiguousarray(np.rot90(x, quarters, axes=(1, 2)))


CLIENTS: tuple[DigitClient, ...] = (
    DigitClient(
        "north",
        0.0,
        (
            DigitTask("rot90", _rotated(1)),
            DigitTask("low", _same, (0, 1, 2, 3, 4)),
            DigitTask("noisy", _noisy),
        ),
    ),
    DigitClient(
        "east",
        0.01,
        (
            DigitTask("inverted", lambda x, _: np.float32(1) - x),
            DigitTask("rot180", _rotated(2)),
            DigitTask("high", _same, (5, 6, 7, 8, 9)),
        ),
    ),
    DigitClient(
        "south",
        0.03,
        (
            DigitTask("mirrored", lambda x, _: np.ascontiguousarray(x[:, :, ::-1])),
            DigitTask("transposed", lambda x, _: np.ascontiguousarray(x.transpose(0, 2, 1))),
        ),
    ),
)
"""Fast, middling and slow; eight tasks."""


@dataclass(frozen=True)
class QuickstartOptions:
    """How large the quickstart is."""

    clients: int = len(CLIENTS)
    tasks: int = sum(len(c.tasks) for c in CLIENTS)
    """Tasks in all; the last arrivals are left out first."""
    epochs: int = 20
    seed: int = 0


def prepare_quickstart(folder: Path, options: QuickstartOptions = QuickstartOptions()) -> Scenario:
    """Write every client's private data below ``folder`` and return the scenario; the same for the same options.

    Raises:
        ConfigError: more clients or tasks than there are, or fewer tasks than clients.
    """
    order = arrival_order(options.clients, options.tasks)
    images, labels = task_rows()
    train = np.arange(len(labels) - TEST_ROWS)
    np.random.default_rng(options.seed).shuffle(train)
    test = np.arange(len(labels) - TEST_ROWS, len(labels))
    plans = []
    for number, client in enumerate(CLIENTS[: options.clients]):
        mine = np.sort(train[number :: options.clients])
        arrivals = [(position, task) for position, (owner, task) in enumerate(order) if owner is client]
        tasks = tuple(_task_plan(task, position, options.clients) for position, task in arrivals)
        defaults: dict[str, TomlValue] = {"epochs": options.epochs, "learning_rate": LEARNING_RATE}
        defaults |= {"seed": options.seed, "pace": client.pace}
        plan = ClientPlan(client.organisation, tasks, defaults=defaults)
        for position, task in arrivals:
            random = np.random.default_rng((options.seed, position))
            for part, rows in (("train", mine), ("test", test)):
                kept = rows[np.isin(labels[rows], task.classes)]
                path = client_folder(folder, plan) / task.name / f"{part}.npz"
                write_npz(path, task.view(images[kept], random), labels[kept])
        plans.append(plan)
    return Scenario("quickstart", "digits-vit", tuple(plans), seed=options.seed, baseline_threads=1)


def arrival_order(clients: int, tasks: int) -> list[tuple[DigitClient, DigitTask]]:
    """Return the first ``tasks`` tasks of the first ``clients`` clients, dealt one round after the other.

    Raises:
        ConfigError: more than there are, or fewer tasks than clients.
    """
    if not 1 <= clients <= len(CLIENTS):
        raise ConfigError(f"quickstart: expected 1 to {len(CLIENTS)} clients, got {clients}")
    chosen = CLIENTS[:clients]
    rounds = max(len(c.tasks) for c in chosen)
    order = [(c, c.tasks[turn]) for turn in range(rounds) for c in chosen if turn < len(c.tasks)]
    if not clients <= tasks <= len(order):
        raise ConfigError(f"quickstart: {clients} clients have {clients} to {len(order)} tasks, got {tasks}")
    return order[:tasks]


def task_rows() -> tuple[Images, Labels]:
    """Return the digits that the backbone never saw: images (1200, 8, 8) from 0 to 1 and labels (1200,)."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = (digits.images[FIRST_TASK_ROW:] / 16.0).astype(np.float32)
    return images, digits.target[FIRST_TASK_ROW:].astype(np.int64)


def write_npz(path: Path, x: Images, y: Labels) -> None:
    """Write ``x`` and ``y`` as the client reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, x=x, y=y)


def _task_plan(task: DigitTask, position: int, clients: int) -> TaskPlan:
    # As many tasks are under way as there are clients: each later one arrives when another is merged.
    arrival = Arrival(merged=max(0, position - clients + 1))
    return TaskPlan(task.name, "image-classification", f"{task.name}/train.npz", f"{task.name}/test.npz", arrival)
