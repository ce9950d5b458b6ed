"""Each kind of task on images, end to end: a real hub, two clients, a task each, better than the frozen backbone.

Nothing is tuned: every task is trained with the defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from share_client.backbone_config import BackboneConfig
from share_client.backbones import Backbone, load_backbone
from share_client.session import SessionOptions, run_session
from share_client.tasks_file import TaskConfig
from share_client.training import TrainingOptions, evaluate, prepare_task, train_lora
from share_core.fingerprint import describe_space
from share_proto.v1 import hub_pb2

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
OPTIONS = SessionOptions(linger_s=0.5, poll_s=0.02, lock_s=0.5)


@pytest.fixture
def federation(own_hub_class: Any, connect: Any, tmp_path: Path) -> Iterator[Callable[..., dict[str, float]]]:
    """Return what runs two clients of a space and gives the last evaluation of each task as the hub has it."""
    hubs: list[Any] = []

    def run(backbone: Backbone, head: str, tasks: dict[str, TaskConfig]) -> dict[str, float]:
        hub = own_hub_class(tmp_path / "server", describe_space(backbone.name, backbone.site_weights()))
        hubs.append(hub)
        hub.start()
        layouts = [hub.client(tmp_path / name, f"{name}/main") for name in tasks]
        paths = []
        for layout, task in zip(layouts, tasks.values(), strict=True):
            path = layout.root / "tasks.toml"
            names = [f'{key} = "{getattr(task, key)}"' for key in ("name", "kind", "train", "test")]
            path.write_text("\n".join([head, 'device = "cpu"', "[[task]]", *names]) + "\n")
            paths.append(path)
        with ThreadPoolExecutor(2) as pool:
            counters = list(
                pool.map(
                    lambda pair: run_session(pair[0].root, pair[1], options=OPTIONS), zip(layouts, paths, strict=True)
                )
            )
        assert all(one.submitted == one.merged >= 1 and one.refused == 0 for one in counters), counters
        found = {}
        for line in connect(layouts[0]).hub.ListEvaluations(hub_pb2.ListEvaluationsRequest()).evaluations:
            found[line.task_id.partition("/")[0]] = line.value
        return found

    yield run
    for hub in hubs:
        hub.stop()


def frozen(backbone: Backbone, config: TaskConfig) -> float:
    """Return the metric of the frozen backbone with a head trained on its features, or without where there is none."""
    task = prepare_task(config, backbone)
    if config.kind == "text-to-image":
        return evaluate(backbone, task, {}, {}).value
    return evaluate(backbone, task, {}, train_lora(backbone, task, 0, TrainingOptions.of(config)).head).value


def test_poses(encoder_config: BackboneConfig, federation: Any, tmp_path: Path) -> None:
    from share_simulations.shapes import write_poses

    backbone = load_backbone(encoder_config, "cpu")
    tasks = {}
    for name, solid, seed in (("north", "pyramid", 11), ("south", "wedge", 12)):
        write_poses(tmp_path / solid, solid, 320, 150, seed)
        files = (tmp_path / solid / "train.jsonl", tmp_path / solid / "test.jsonl")
        tasks[name] = TaskConfig(solid, "pose", *files)
    got = federation(backbone, _table(encoder_config), tasks)
    for name, config in tasks.items():
        assert got[name] > frozen(backbone, config) + 0.05


def test_text_to_image(denoiser_folder: Path, federation: Any, tmp_path: Path) -> None:
    from share_simulations.shapes import write_captions

    backbone = load_backbone(str(denoiser_folder), "cpu")
    tasks = {}
    for name, forms, dark, seed in (("north", ("square", "disc"), True, 13), ("south", ("cross", "ring"), False, 14)):
        write_captions(tmp_path / name, forms, 96, 24, seed, dark)
        files = (tmp_path / name / "train.jsonl", tmp_path / name / "test.jsonl")
        tasks[name] = TaskConfig(name, "text-to-image", *files)
    got = federation(backbone, f'backbone = "{denoiser_folder}"', tasks)
    for name, config in tasks.items():
        before = frozen(backbone, config)
        assert got[name] > before * 0.995, f"{name}: the loss was {-before:.3f}, is {-got[name]:.3f}"


def test_real_images_on_a_real_residual_network(federation: Any, tmp_path: Path) -> None:
    """Flowers and handwritten digits on the ResNet-20 of CIFAR-10."""
    weights = DATA / "backbones" / "resnet20-12fca82f.th"
    if not weights.is_file():
        pytest.skip("needs ../shared/data")
    pytest.importorskip("PIL", reason="needs pillow for JPEG")
    config = BackboneConfig("resnet20", weights=weights)
    backbone = load_backbone(config, "cpu")
    tasks = {}
    for name, images in (("north", _flowers), ("south", _digits)):
        (tmp_path / "data" / name).mkdir(parents=True)
        files = (tmp_path / "data" / name / "train.npz", tmp_path / "data" / name / "test.npz")
        for file, (x, y) in zip(files, images(), strict=True):
            np.savez(file, x=x, y=y)
        tasks[name] = TaskConfig(name, "image-classification", *files)
    got = federation(backbone, _table(config), tasks)
    for name, task in tasks.items():
        assert got[name] > frozen(backbone, task) + 0.03, (name, got, frozen(backbone, task))


def _table(config: BackboneConfig) -> str:
    """Return the table of a backbone as tasks.toml has it, with the keys above it that must stand first."""
    lines = [f"backbone.model = {json.dumps(config.model)}", f'backbone.weights = "{config.weights}"']
    lines += [f"backbone.sites = {json.dumps(config.sites)}"] if config.sites else []
    lines += [f"backbone.image = {json.dumps(config.image)}"] if config.image else []
    return "\n".join(lines)


def _flowers() -> list[tuple[Any, Any]]:
    """Return training and test rows of 32 x 32 flowers."""
    import io

    from PIL import Image

    archive = np.load(DATA / "image" / "flowers5_jpeg.npz")
    splits = []
    for split, count in (("train", 192), ("test", 120)):
        ends = np.cumsum(archive[f"{split}_len"])[:count]
        starts = np.concatenate([[0], ends[:-1]])
        blob = archive[f"{split}_blob"]
        opened = [Image.open(io.BytesIO(blob[a:b].tobytes())) for a, b in zip(starts, ends, strict=True)]
        x = np.stack([np.asarray(one.convert("RGB").resize((32, 32))) for one in opened])
        splits.append((x, archive[f"{split}_y"][:count].astype(int)))
    return splits


def _digits() -> list[tuple[Any, Any]]:
    """Return training and test rows of handwritten digits, with a border and three equal channels."""
    archive = np.load(DATA / "image" / "mnist.npz")
    splits = []
    for split, count in (("train", 192), ("test", 120)):
        x = np.pad(archive[f"x_{split}"][:count], ((0, 0), (2, 2), (2, 2)))
        splits.append((np.repeat(x[..., None], 3, axis=3), archive[f"y_{split}"][:count].astype(int)))
    return splits
