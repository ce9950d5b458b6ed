"""A real training that starts from a published head, and what it tells of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from share_client.trainer import BackboneTrainer, Trained
from share_client.training import in_space
from share_core.fingerprint import describe_space
from share_core.space import empty_space
from share_core.types import SharedHead, Update
from share_core.wire import encode_update, payload_bytes

Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function (labels, shared=None, share=True) that trains four steps at a rate that moves nothing far."""
    trainers: dict[tuple[int, bool], BackboneTrainer] = {}

    def run(labels: int, shared: SharedHead | None = None, share: bool = True) -> Trained:
        key = (labels, share)
        if key not in trainers:
            folder, draw = tmp_path_factory.mktemp("task"), np.random.default_rng(0)
            for part in ("train", "test"):
                np.savez(folder / f"{part}.npz", x=draw.random((24, 8, 8), dtype=np.float32), y=np.arange(24) % labels)
            file = folder / "tasks.toml"
            file.write_text(
                'backbone = "digits-vit"\ndevice = "cpu"\n[[task]]\nname = "a"\nkind = "image-classification"\n'
                'train = "train.npz"\ntest = "test.npz"\nepochs = 1\nlearning_rate = 1e-7\n'
                f"share_head = {str(share).lower()}\n"
            )
            trainers[key] = BackboneTrainer(file)
        trainer = trainers[key]
        (task,) = trainer.tasks()
        space = empty_space(describe_space("digits", trainer.weights()))
        return trainer.train(task, space, "org/a", lambda step: None, shared)

    return run


def moved(trained: Trained, start: Mapping[str, Tensor]) -> float:
    """Return how far the trained head lies from a start."""
    return max(float((trained.head[name] - tensor).abs().max()) for name, tensor in start.items())


def published(trained: Trained) -> SharedHead:
    """Return what a hub would publish of a training, moved to where no fresh head begins."""
    tensors = {name: tensor + 3 for name, tensor in trained.update.head.items()}
    return SharedHead("org/a", 1, ("org",), (), trained.schema_sha256, tensors)


def test_training_starts_from_a_head_for_the_same_labels(train: Train) -> None:
    first = train(3)
    assert len(first.schema_sha256) == 64
    shared = published(first)
    assert moved(train(3, shared), shared.tensors) < 1e-3
    assert moved(train(3), shared.tensors) > 1, "a fresh head begins elsewhere"


def test_a_head_for_other_labels_or_of_another_form_is_left(train: Train) -> None:
    shared = published(train(3))
    other = train(4)
    assert other.schema_sha256 != shared.schema_sha256
    assert moved(train(4, shared), other.head) == 0, "it began fresh"
    fresh = train(3)
    for wrong in (
        replace(shared, schema_sha256="0" * 64),
        replace(shared, schema_sha256=""),
        replace(shared, tensors={"weight": torch.ones(3, 2)}),
    ):
        assert moved(train(3, wrong), fresh.head) == 0


def sent(trained: Trained) -> tuple[int, str]:
    """Return the bytes of heads in what leaves, and what it tells of the labels."""
    return payload_bytes(encode_update(trained.update)).heads, trained.schema_sha256


def test_a_private_head_leaves_no_trace(train: Train) -> None:
    assert sent(train(3, share=False)) == (0, "")
    assert sent(train(3))[0] == 4 * sum(tensor.numel() for tensor in train(3).head.values())


def test_planted_bug_a_private_head_that_is_sent_is_caught(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(base_version: int, sites: Any, head: Any) -> Update:
        return Update(base_version, sites, {"weight": torch.ones(3, 2)})

    monkeypatch.setattr(in_space, "Update", leaks)
    assert sent(train(3, share=False)) != (0, "")
