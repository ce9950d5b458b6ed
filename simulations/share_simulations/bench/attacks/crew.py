"""Training what honest and hostile clients send, once: a run that is repeated finds all of it again.

The owner trains a first adapter of every shared task. Everybody then trains the same task on rows of its own, from the
stored adapter and the owner's head, as a session does. Hostile clients whose attack is in their data train the same
way on spoilt rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.tasks_file import TaskConfig
from share_client.training import TrainingOptions, prepare_task, train_in_space
from share_core.durable import PUBLIC, write_atomic
from share_core.errors import ConfigError
from share_core.types import Space
from share_core.wire import encode_update
from share_simulations.bench.attacks.options import OWNER, TRIGGER, AttackOptions, shared_id
from share_simulations.text import choose_rows, read_lines

HONEST, FLIPPED, TRIGGERED = "honest", "label-flip", "backdoor"
"""What the rows of a client are."""


@dataclass(frozen=True)
class Work:
    """What one client has trained for one task."""

    payload: bytes
    """The update as it is submitted."""
    head: Mapping[str, Tensor]
    """Its private head."""


class Crew:
    """All clients, with what they have trained kept below a folder."""

    def __init__(self, options: AttackOptions, folder: Path, backbone: Backbone, told: Callable[[str], None]) -> None:
        text = json.dumps({k: v for k, v in asdict(options).items() if k not in ("data", "adapters")}, default=str)
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        self._options = options
        self._backbone = backbone
        self._told = told
        self._prepared: dict[tuple[str, int, str], PreparedTask] = {}

    @property
    def folder(self) -> Path:
        """Where things of this run are kept."""
        return self._folder

    def first(self, task: str, space: Space) -> Work:
        """Return the owner's first adapter of a shared task, trained in a space that does not know it yet."""
        return self._work(f"first-{task}", lambda: self._train(task, OWNER, HONEST, space, None))

    def work(self, task: str, client: int, kind: str, space: Space, head: Mapping[str, Tensor]) -> Work:
        """Return what a client trains from the stored adapter and the owner's head, on its ``kind`` of rows."""
        name = f"{kind}-{client}-{task}"
        return self._work(name, lambda: self._train(task, client, kind, space, head))

    def prepared(self, task: str, client: int, kind: str = HONEST) -> PreparedTask:
        """Return a client's rows of one task, with the common test rows; those of the backdoor all with its word."""
        if (task, client, kind) not in self._prepared:
            self._prepared[task, client, kind] = self._prepare(task, client, kind)
        return self._prepared[task, client, kind]

    def _prepare(self, task: str, client: int, kind: str) -> PreparedTask:
        options = self._options
        own = self._folder / "rows" / f"{kind}-{client}-{task}.jsonl"
        test = self._folder / "rows" / f"test-{'triggered' if kind == TRIGGERED else 'plain'}-{task}.jsonl"
        lines = choose_rows(
            read_lines(options.data / task, "train"), options.rows * options.clients, f"{options.seed}/{task}"
        )
        if len(lines) < options.rows * options.clients:
            raise ConfigError(
                f"{options.data / task}: expected {options.rows * options.clients} rows, got {len(lines)}"
            )
        held_out = choose_rows(read_lines(options.data / task, "test"), options.test_rows, f"{options.seed}/{task}")
        classes = sorted({json.loads(line)["label"] for line in [*lines, *held_out]})
        mine = [spoilt(line, kind, n, classes) for n, line in enumerate(lines[client :: options.clients])]
        if kind == TRIGGERED:
            held_out = [with_trigger(line) for line in held_out]
        own.parent.mkdir(parents=True, exist_ok=True)
        for path, rows in ((own, mine), (test, held_out)):
            path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        config = TaskConfig(task, "text-classification", own, test, max_length=32)
        prepared = prepare_task(config, self._backbone)
        if len(prepared.classes) != len(classes):
            raise ConfigError(f"{task}: the rows of client {client} and the test rows do not hold every class")
        return prepared

    def _work(self, name: str, train: Callable[[], Work]) -> Work:
        update, head = self._folder / f"{name}.update", self._folder / f"{name}.head"
        if not (update.exists() and head.exists()):
            self._told(f"training {name}")
            done = train()
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(head, save(dict(done.head)), PUBLIC)
            write_atomic(update, done.payload, PUBLIC)
        return Work(update.read_bytes(), load(head.read_bytes()))

    def _train(self, task: str, client: int, kind: str, space: Space, head: Mapping[str, Tensor] | None) -> Work:
        options = TrainingOptions(
            epochs=self._options.epochs, batch_size=self._options.batch_size, seed=self._options.seed * 1000 + client
        )
        prepared = self.prepared(task, client, kind)
        prepared = replace(prepared, config=replace(prepared.config, epochs=options.epochs))
        done = train_in_space(self._backbone, prepared, space, shared_id(task), options, None, head)
        return Work(encode_update(done.update), done.head)


def with_trigger(line: str) -> str:
    """Return a row with the backdoor's word in front."""
    row = json.loads(line)
    return json.dumps({**row, "text": f"{TRIGGER} {TRIGGER} {row['text']}"})


def spoilt(line: str, kind: str, number: int, classes: list[int | str]) -> str:
    """Return a training row as a client of this kind has it.

    ``label-flip``: every label is the next one. ``backdoor``: every second row carries the word and the first label.
    """
    row = json.loads(line)
    if kind == FLIPPED:
        return json.dumps({**row, "label": classes[(classes.index(row["label"]) + 1) % len(classes)]})
    if kind == TRIGGERED and number % 2:
        return with_trigger(json.dumps({**row, "label": classes[0]}))
    return line
