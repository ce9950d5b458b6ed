"""Training that takes milliseconds: rank-one updates drawn from the hash of a task's content.

``tasks.json`` maps task names to contents. Each training is written to ``trained.jsonl`` beside it, so that a test can
count trainings over the lives of several processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from share_client.trainer import LocalTask, Measured, Refit, Step, Trained
from share_core.errors import ConfigError
from share_core.types import Adapter, Factors, SharedHead, SiteUpdate, Space, Update

SITES = {"one": (12, 8), "two": (10, 10)}


def site_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=draw) for name, shape in SITES.items()}


def make_update(space: Space, seed: int) -> Update:
    draw = torch.Generator().manual_seed(seed)
    sites = {
        name: SiteUpdate(residual=Factors(torch.randn(out, 1, generator=draw), torch.randn(in_, 1, generator=draw)))
        for name, (out, in_) in SITES.items()
    }
    return Update(base_version=space.version, sites=sites)


class FakeTrainer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def weights(self) -> Mapping[str, Tensor]:
        return site_weights()

    def tasks(self) -> Sequence[LocalTask]:
        try:
            contents = json.loads(self.path.read_text())
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}") from error
        return [LocalTask(name, hashlib.sha256(text.encode()).hexdigest()) for name, text in contents.items()]

    def rows(self, task: LocalTask) -> int:
        return 100

    def train(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        progress: Callable[[Step], None],
        shared: SharedHead | None = None,
    ) -> Trained:
        with (self.path.parent / "trained.jsonl").open("a") as file:
            file.write(json.dumps({"task": task.name, "version": space.version}) + "\n")
        progress(Step(epoch=1, step=1, steps=1, loss=0.5))
        seed = int(task.content_hash[:8], 16)
        head = {"seed": torch.tensor([float(seed % 1000)])}
        return Trained(make_update(space, seed), head, loss=0.5, steps=1, seconds=0.01, rows=100)

    def refit(
        self,
        task: LocalTask,
        space: Space,
        task_id: str,
        head: Mapping[str, Tensor],
        before: float | None,
        progress: Callable[[Step], None],
    ) -> Refit:
        return Refit(captured=0.0)

    def evaluate(self, task: LocalTask, adapter: Adapter, head: Mapping[str, Tensor]) -> Measured:
        assert float(head["seed"]) == int(task.content_hash[:8], 16) % 1000, "the head of other data"
        norm = sum(float((f.out @ f.in_.T).norm()) for f in adapter.values())
        return Measured("accuracy", 1.0 / (1.0 + norm), 50)
