"""Preparing tasks: classes, sizes, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from share_client.kind_names import KINDS
from share_client.kinds import find_kind
from share_client.tasks_file import TaskConfig
from share_client.training import Backbone, PreparedTask, prepare_task
from share_client.training.batches import epoch_batches, sorted_batches
from share_core.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> TaskConfig:
    random = np.random.default_rng(0)
    for split, labels in (("train", [7, 3, 7, 3]), ("test", [3, 9])):
        np.savez(tmp_path / f"{split}.npz", x=random.random((len(labels), 8, 8)), y=np.array(labels))
    return TaskConfig("t", "image-classification", tmp_path / "train.npz", tmp_path / "test.npz")


def test_classes_are_the_sorted_labels_of_both_splits(config: TaskConfig, backbone: Backbone) -> None:
    task = prepare_task(replace(config, rows=4), backbone)
    assert task.classes == (3, 7, 9)
    _, targets = task.test.batch([0, 1], torch.device("cpu"))
    assert targets.tolist() == [0, 2]


def test_a_class_without_training_rows_is_refused_unless_rows_cuts_them(config: TaskConfig, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"test\.npz: row 1: label: expected one of the 2 classes .*1 test row"):
        prepare_task(config, backbone)


def test_rows_are_cut(config: TaskConfig, backbone: Backbone) -> None:
    task = prepare_task(replace(config, rows=3, test_rows=1), backbone)
    assert (task.train_rows, task.test_rows) == (3, 1)


def test_other_image_size_is_refused(config: TaskConfig, backbone: Backbone, tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=np.zeros((4, 28, 28)), y=np.arange(4))
    with pytest.raises(ConfigError, match=r"expected images of 8 x 8 .* got 28 x 28"):
        prepare_task(config, backbone)


def test_one_class_is_refused(config: TaskConfig, backbone: Backbone, tmp_path: Path) -> None:
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=np.zeros((4, 8, 8)), y=np.zeros(4, int))
    with pytest.raises(ConfigError, match="at least two classes"):
        prepare_task(config, backbone)


def test_every_row_comes_once_an_epoch(bars: PreparedTask) -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (epoch_batches(bars.train, 50, draw) for _ in range(2))
    for batches in (first, second, sorted_batches(bars.train, 50)):
        assert sorted(row for batch in batches for row in batch) == list(range(192))
        assert sorted(map(len, batches)) == [42, 50, 50, 50]
    assert first != second


@pytest.mark.parametrize("name", KINDS)
def test_every_name_is_that_of_its_kind(name: str) -> None:
    assert find_kind(name).name == name
