"""``share-sim bench tasks``: what it prints is what training each task by hand gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from share_client.tasks_file import read_tasks
from share_client.training import TrainingOptions, evaluate, load_backbone, prepare_task, train_in_space, train_lora
from share_core.fingerprint import describe_space
from share_core.space import empty_space, update_adapter
from share_simulations.bench.tasks import tasks_table
from share_simulations.cli import app


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for part, rows in (("train", 24), ("test", 20)):
        y = np.arange(rows) % 2
        x = draw.random((rows, 8, 8), dtype=np.float32) * 0.5
        x[np.arange(rows), y * 4, :] += 0.5
        np.savez(tmp_path / f"{part}.npz", x=x, y=y)
    path = tmp_path / "tasks.toml"
    path.write_text(
        'backbone = "digits-vit"\ndevice = "cpu"\n[[task]]\nname = "bars"\nkind = "image-classification"\n'
        'train = "train.npz"\ntest = "test.npz"\nepochs = 2\n'
    )
    return path


def test_the_figures_are_those_of_training_by_hand(tasks: Path) -> None:
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, ["bench", "tasks", str(tasks), "--seeds", "2", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    backbone = load_backbone("digits-vit", "cpu")
    space = empty_space(describe_space("digits-vit", backbone.site_weights()))
    values = []
    for seed in range(2):
        config = replace(read_tasks(tasks).tasks[0], seed=seed)
        task, training = prepare_task(config, backbone), TrainingOptions.of(config)
        ours = train_in_space(backbone, task, space, "o/t", training)
        ways = {
            "fedshare": (update_adapter(ours.update, space.bases), ours.head),
        }
        for way, rank in (("lora", 8), ("frozen", 0)):
            separate = train_lora(backbone, task, rank, training)
            ways[way] = (separate.adapter, separate.head)
        values.append({way: evaluate(backbone, task, *made).value for way, made in ways.items()})
    found = report["tasks"]["bars"]["metrics"]["accuracy"]
    assert found["by_seed"] == {way: [one[way] for one in values] for way in ("frozen", "lora", "fedshare")}
    for way in ("frozen", "lora", "fedshare"):
        assert found[way] == pytest.approx(sum(one[way] for one in values) / 2)
    assert (report["version"], report["tasks"]["bars"]["test_rows"]) == (0, 20)
    assert tasks_table(report).row_count == 1


def test_a_version_of_the_space_that_is_not_there_is_named(tasks: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "tasks", str(tasks), "--space", str(tmp_path / "none.safetensors")])
    assert result.exit_code == 1
    assert "cannot read this version of the space" in str(result.exception)


def test_a_file_without_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "incoming").mkdir()
    (tmp_path / "tasks.toml").write_text('backbone = "digits-vit"\nwatch = "incoming"\n')
    result = CliRunner().invoke(app, ["bench", "tasks", str(tmp_path / "tasks.toml")])
    assert result.exit_code == 1
    assert "expected a [[task]] to measure, got none" in str(result.exception)
