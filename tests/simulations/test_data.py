"""The data that scenarios write: which rows, whose, and the same each time."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from share_client.backbones import pretrain_digits
from share_core.errors import ConfigError
from share_simulations import digits
from share_simulations.bench.texts import draw_rows
from share_simulations.digits import QuickstartOptions, prepare_quickstart, task_rows
from share_simulations.text import TextOptions, choose_rows, prepare_text


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*.*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def images(path: Path) -> list[bytes]:
    with np.load(path) as archive:
        return [row.tobytes() for row in archive["x"]]


def test_task_rows_are_not_the_rows_of_the_pretraining() -> None:
    pretraining, _ = pretrain_digits.pretraining_digits()
    known = {row.tobytes() for row in pretraining.numpy().reshape(-1, 8, 8).astype(np.float32)}
    ours, labels = task_rows()
    assert len(ours) == len(labels) == 1200
    assert not known & {row.tobytes() for row in ours}


def test_quickstart_is_the_same_each_time_and_follows_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_quickstart(tmp_path / name, QuickstartOptions(seed=seed))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert hashes(tmp_path / "a") != hashes(tmp_path / "c")


def test_quickstart_has_three_clients_and_eight_tasks_arriving_over_time(tmp_path: Path) -> None:
    scenario = prepare_quickstart(tmp_path)
    assert len(scenario.clients) == 3
    assert len(scenario.task_ids) == 8
    arrivals = sorted(t.arrival.merged for c in scenario.clients for t in c.tasks)
    assert arrivals == [0, 0, 0, 1, 2, 3, 4, 5]
    assert len({c.defaults["pace"] for c in scenario.clients}) == 3, "clients of different speed"


def test_clients_train_on_disjoint_images_apart_from_the_test_rows(tmp_path: Path) -> None:
    scenario = prepare_quickstart(tmp_path)
    originals = {row.tobytes(): number for number, row in enumerate(task_rows()[0])}
    undo = {"rot90": lambda x: np.rot90(x, -1, axes=(1, 2)), "mirrored": lambda x: x[:, :, ::-1], "high": lambda x: x}
    trained: list[set[int]] = []
    for client, name in (("north", "rot90"), ("east", "high"), ("south", "mirrored")):
        rows: dict[str, set[int]] = {}
        for part in ("train", "test"):
            with np.load(tmp_path / client / name / f"{part}.npz") as archive:
                seen = np.ascontiguousarray(undo[name](archive["x"]))
            rows[part] = {originals[row.tobytes()] for row in seen}
        assert not rows["train"] & rows["test"]
        trained.append(rows["train"])
    assert not trained[0] & trained[1]
    assert not trained[0] & trained[2]
    assert not trained[1] & trained[2]
    assert scenario.backbone == "digits-vit"


def test_every_task_stays_within_its_classes_and_range(tmp_path: Path) -> None:
    prepare_quickstart(tmp_path)
    for client in digits.CLIENTS:
        for task in client.tasks:
            with np.load(tmp_path / client.organisation / task.name / "train.npz") as archive:
                assert set(archive["y"]) == set(task.classes)
                assert archive["x"].dtype == np.float32
                assert archive["x"].min() >= 0
                assert archive["x"].max() <= 1


@pytest.mark.parametrize(("clients", "tasks"), [(0, 3), (4, 8), (3, 2), (1, 4)])
def test_quickstart_sizes_that_do_not_exist_are_refused(tmp_path: Path, clients: int, tasks: int) -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        prepare_quickstart(tmp_path, QuickstartOptions(clients=clients, tasks=tasks))


def write_text_task(root: Path, name: str, rows: int, packed: bool) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        lines = "".join(json.dumps({"text": f"{name} {part} {i}", "label": i % 2}) + "\n" for i in range(rows))
        if packed:
            (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def test_text_tasks_are_dealt_in_turn_and_arrive_one_after_another(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        write_text_task(tmp_path / "data", name, rows=20, packed=number == 1)
    options = TextOptions(tmp_path / "data", ("a", "b", "c"), rows=8, test_rows=5, clients=2)
    scenario = prepare_text(tmp_path / "run", options)
    assert scenario.task_ids == ("north/a", "north/c", "east/b")
    arrivals = {c.task_id(t): t.arrival.merged for c in scenario.clients for t in c.tasks}
    assert arrivals == {"north/a": 0, "east/b": 0, "north/c": 1}
    for path, count in (("north/a/train", 8), ("east/b/train", 8), ("north/c/test", 5)):
        rows = [json.loads(line) for line in (tmp_path / "run" / f"{path}.jsonl").read_text().splitlines()]
        assert len({r["text"] for r in rows}) == count
        _, name, part = path.split("/")
        assert all(r["text"].startswith(f"{name} {part} ") for r in rows)


def test_text_rows_are_the_same_each_time_and_follow_the_seed() -> None:
    lines = [str(i) for i in range(100)]
    assert choose_rows(lines, 10, "0/a/train") == choose_rows(lines, 10, "0/a/train")
    assert choose_rows(lines, 10, "0/a/train") != choose_rows(lines, 10, "1/a/train")
    assert choose_rows(lines, 10, "0/a/train") != lines[:10]
    assert sorted(choose_rows(lines, 1000, "x")) == sorted(lines)


def test_rows_that_are_drawn_again_do_not_change_under_a_reader(tmp_path: Path) -> None:
    """Chains of one benchmark draw the same rows side by side; one must not read what the other has half written."""
    write_text_task(tmp_path / "data", "a", rows=20, packed=False)
    train, test = draw_rows(tmp_path / "data", tmp_path / "rows", "a", 8, 5, "0")
    opened = {path: tmp_path / f"opened-{path.name}" for path in (train, test)}
    for path, reader in opened.items():
        reader.hardlink_to(path)
    before = {path: path.read_bytes() for path in opened}
    draw_rows(tmp_path / "data", tmp_path / "rows", "a", 8, 5, "0")
    for path, reader in opened.items():
        assert path.read_bytes() == before[path] == reader.read_bytes()
        assert path.stat().st_ino != reader.stat().st_ino, "the file was written in place"
    assert sorted(path.name for path in train.parent.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_a_text_task_without_files_is_named(tmp_path: Path) -> None:
    write_text_task(tmp_path / "data", "a", rows=4, packed=False)
    with pytest.raises(ConfigError, match=r"data/b: expected train.jsonl or train.jsonl.gz, got neither"):
        prepare_text(tmp_path / "run", TextOptions(tmp_path / "data", ("a", "b"), clients=1))


def test_more_text_clients_than_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 tasks can be dealt to 1 to 2 clients, got 3"):
        prepare_text(tmp_path / "run", TextOptions(tmp_path, ("a", "b"), clients=3))
