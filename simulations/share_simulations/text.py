"""Text federations from files: ``DIR/<task>/{train,test}.jsonl[.gz]`` dealt to clients.

Rows are passed on as they are (``text``, optional ``text_b``, ``label``); only their choice and order is
ours: a seeded shuffle, then the first N. The same rows serve the federation and the baselines.
"""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from share_core.errors import ConfigError
from share_simulations.scenario import Arrival, ClientPlan, Scenario, TaskPlan, client_folder

ORGANISATIONS = ("north", "east", "south", "west")
"""Names of the first clients; further ones are numbered."""


@dataclass(frozen=True)
class TextOptions:
    """Which rows a text federation is made of."""

    data: Path
    tasks: tuple[str, ...]
    """Folders below ``data``, in the order of arrival."""
    rows: int = 1500
    """Training rows per task."""
    test_rows: int = 1000
    """Largest number of test rows per task."""
    clients: int = 3
    epochs: int = 3
    seed: int = 0


def prepare_text(folder: Path, options: TextOptions) -> Scenario:
    """Write every client's rows below ``folder`` and return the scenario. Deterministic in the options.

    Raises:
        ConfigError: a task without files, no tasks, or fewer tasks than clients.
    """
    if not 1 <= options.clients <= len(options.tasks):
        raise ConfigError(
            f"text: {len(options.tasks)} tasks can be dealt to 1 to {len(options.tasks)} clients, got {options.clients}"
        )
    defaults = {"epochs": options.epochs, "seed": options.seed}
    plans = []
    for number in range(options.clients):
        mine = list(enumerate(options.tasks))[number :: options.clients]
        tasks = tuple(_task_plan(name, position, options.clients) for position, name in mine)
        plan = ClientPlan(organisation(number), tasks, defaults=defaults)
        for _, name in mine:
            target = client_folder(folder, plan) / name.lower()
            target.mkdir(parents=True, exist_ok=True)
            for part, limit in (("train", options.rows), ("test", options.test_rows)):
                chosen = choose_rows(read_lines(options.data / name, part), limit, f"{options.seed}/{name}/{part}")
                (target / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
        plans.append(plan)
    return Scenario("text", "minilm", tuple(plans), seed=options.seed, stall_s=900.0)


def organisation(number: int) -> str:
    """Return the name of the organisation with this number, from 0."""
    return ORGANISATIONS[number] if number < len(ORGANISATIONS) else f"site{number + 1}"


def read_lines(folder: Path, part: str) -> list[str]:
    """Return the lines of ``folder/part.jsonl`` or ``folder/part.jsonl.gz`` that are not blank.

    Raises:
        ConfigError: neither file is there, or it cannot be read.
    """
    plain, packed = folder / f"{part}.jsonl", folder / f"{part}.jsonl.gz"
    if not plain.is_file() and not packed.is_file():
        raise ConfigError(f"{folder}: expected {plain.name} or {packed.name}, got neither; check --data and --tasks")
    path = plain if plain.is_file() else packed
    try:
        with path.open(encoding="utf-8") if path is plain else gzip.open(packed, "rt", encoding="utf-8") as stream:
            return [line.rstrip("\n") for line in stream if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read text: {error}") from error


def choose_rows(lines: Iterable[str], limit: int, seed: str) -> list[str]:
    """Return the first ``limit`` lines after a shuffle that depends on ``seed`` alone."""
    shuffled = list(lines)
    digest = hashlib.sha256(seed.encode()).digest()
    random.Random(int.from_bytes(digest)).shuffle(shuffled)
    return shuffled[:limit]


def _task_plan(name: str, position: int, clients: int) -> TaskPlan:
    task = name.lower()
    arrival = Arrival(merged=max(0, position - clients + 1))
    return TaskPlan(task, "text-classification", f"{task}/train.jsonl", f"{task}/test.jsonl", arrival)
