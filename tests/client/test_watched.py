"""Folders dropped into a watched directory become tasks, and nothing is taken before it is whole."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from share_client import tasks_file, watched
from share_client.backbones import load_backbone
from share_client.data.content import content_hash
from share_client.kind_names import is_import_path
from share_client.kinds.custom import load_custom
from share_client.records import Records
from share_client.session import SessionOptions, run_session
from share_client.tasks_file import TasksFile, read_tasks
from share_client.trainer import BackboneTrainer
from share_client.watched import Settling, dropped_tasks
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space

HEAD = 'backbone = "digits-vit"\ndevice = "cpu"\nwatch = "incoming"\n[defaults]\nkind = "image-classification"\n'


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settling(clock: Clock) -> Settling:
    return Settling(clock, clock)


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    (tmp_path / "incoming").mkdir()
    (tmp_path / "tasks.toml").write_text(HEAD)
    return tmp_path / "incoming"


@pytest.fixture
def look(incoming: Path, clock: Clock, settling: Settling) -> Callable[[], tuple[list[str], list[str]]]:
    """Look twice, with time between; return names of tasks and remarks of the second look."""

    def twice() -> tuple[list[str], list[str]]:
        file = read_tasks(incoming.parent / "tasks.toml")
        dropped_tasks(file, settling)
        clock.now += watched.SETTLE_S
        found = dropped_tasks(file, settling)
        return [task.name for task in found.tasks], list(found.remarks)

    return twice


def drop(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def names(file: TasksFile, settling: Settling) -> list[str]:
    return [task.name for task in dropped_tasks(file, settling).tasks]


def half_written(incoming: Path, clock: Clock, settling: Settling) -> list[list[str]]:
    """Write a folder bit by bit; return what was taken at each look, the last two of them of the whole folder."""
    file = read_tasks(incoming.parent / "tasks.toml")
    folder = drop(incoming / "slow", test_npz="t")
    taken = [names(file, settling)]
    for text in ("one", "one two", "one two three"):
        (folder / "train.npz").write_text(text)
        clock.now += 5.0
        taken.append(names(file, settling))
    clock.now += watched.SETTLE_S
    taken.append(names(file, settling))
    return taken


def test_what_is_still_written_is_not_taken(
    incoming: Path, clock: Clock, settling: Settling, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert half_written(incoming, clock, settling) == [[], [], [], [], ["slow"]]
    (incoming / "slow" / "train.npz").write_text("one two three four")
    file = read_tasks(incoming.parent / "tasks.toml")
    assert names(file, settling) == [], "changed data is being written as well"
    clock.now += watched.SETTLE_S / 2
    assert names(file, settling) == []
    clock.now += watched.SETTLE_S / 2
    assert names(file, settling) == ["slow"]
    monkeypatch.setattr(watched, "SETTLE_S", 0.0)
    assert half_written(incoming, clock, Settling(clock, clock))[1] == ["slow"], "the planted bug is not seen"


def test_a_file_that_arrives_late_in_the_folder_counts(incoming: Path, clock: Clock, settling: Settling) -> None:
    file = read_tasks(incoming.parent / "tasks.toml")
    folder = drop(incoming / "slow", train_npz="x", test_npz="t")
    assert names(file, settling) == []
    clock.now += watched.SETTLE_S
    drop(folder, task_toml="epochs = 5\n")
    assert names(file, settling) == []
    clock.now += watched.SETTLE_S
    (task,) = dropped_tasks(file, settling).tasks
    assert task.epochs == 5


def test_files_of_the_tasks_file_are_taken_at_once_unless_they_are_fresh(
    tmp_path: Path, clock: Clock, settling: Settling
) -> None:
    path = tmp_path / "train.npz"
    path.write_text("data")
    os.utime(path, (clock.now - 60, clock.now - 60))
    assert settling.is_whole(path, named=True)
    assert not Settling(clock, clock).is_whole(path), "dropped files are looked at twice whatever their time"
    path.write_text("more data")
    os.utime(path, (clock.now, clock.now))
    assert not settling.is_whole(path, named=True)
    clock.now += watched.SETTLE_S
    assert settling.is_whole(path, named=True)
    path.unlink()
    assert not settling.is_whole(path, named=True)
    ahead = tmp_path / "ahead.npz"
    ahead.write_text("the clock of its machine is ahead")
    os.utime(ahead, (clock.now + 900, clock.now + 900))
    assert not settling.is_whole(ahead, named=True)
    clock.now += watched.SETTLE_S
    assert settling.is_whole(ahead, named=True)


def test_a_folder_is_a_task_under_the_defaults(incoming: Path, look: Any, settling: Settling) -> None:
    drop(incoming / "one", train_npz="x", test_npz="t")
    drop(incoming / "two", train_npz="x", task_toml="epochs = 7\nvalidation = 0.25\n")
    (incoming / "two" / "train.npz").rename(incoming / "two" / "train.jsonl.gz")
    drop(incoming / "three", test_npz="t")
    drop(incoming / ".hidden", train_npz="x", test_npz="t")
    (incoming / "four").mkdir()
    drop(incoming / "four" / "train", a_png="x")
    drop(incoming / "four" / "test", a_png="x")
    (incoming / "note.txt").write_text("no folder")
    assert look() == (["four", "one", "two"], [])
    four, one, two = dropped_tasks(read_tasks(incoming.parent / "tasks.toml"), settling).tasks
    assert (four.train, four.test) == (incoming / "four" / "train", incoming / "four" / "test")
    assert (one.kind, one.train, one.epochs) == ("image-classification", incoming / "one" / "train.npz", None)
    assert (two.epochs, two.validation, two.test) == (7, 0.25, None)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train_npz": "x"}, "key 'test' is missing"),
        ({"train_npz": "x", "train_csv": "x", "test_npz": "t"}, "expected one train file, got train.csv, train.npz"),
        ({"train_npz": "x", "test_npz": "t", "task_toml": "epochs = "}, "task.toml: cannot be read"),
        ({"train_npz": "x", "test_npz": "t", "task_toml": "epochs = 0"}, "epochs: expected an integer from 1"),
        ({"train_npz": "x", "test_npz": "t", "task_toml": "epoch = 3"}, "unknown key 'epoch'"),
        ({"train_npz": "x", "test_npz": "t", "task_toml": 'name = "b"'}, "the folder says it already"),
    ],
)
def test_a_folder_that_is_no_task_says_why_and_disturbs_no_other(
    incoming: Path, look: Any, files: dict[str, str], says: str
) -> None:
    drop(incoming / "broken", **files)
    drop(incoming / "good", train_npz="x", test_npz="t")
    found, (remark,) = look()
    assert found == ["good"]
    assert says in remark
    assert str(incoming / "broken") in remark


EVIL = """
import pathlib
from share_client.kinds.text_classification import TextClassification as Kind
pathlib.Path(__file__).with_name("ran").touch()
"""
HARMLESS = "from share_client.kinds.text_classification import TextClassification as Kind\n"


def code_runs(folder: Path, look: Any, settling: Settling, module: str) -> bool:
    """Drop a task with code beside it; return whether that code runs when the task is prepared."""
    drop(folder, train_npz="x", test_npz="t", **{f"{module}_py": EVIL})
    look()
    tasks = dropped_tasks(read_tasks(folder.parent.parent / "tasks.toml"), settling).tasks
    for task in tasks:
        if is_import_path(task.kind):
            load_custom(task.kind)
    return (folder / "ran").exists()


def test_what_is_dropped_names_no_code(
    incoming: Path, look: Any, settling: Settling, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("evilone:Kind", "../bad/evilone:Kind", "share_client.kinds.pose:Pose", "evilone"):
        drop(incoming / "bad", task_toml=f'kind = "{kind}"\n')
        assert not code_runs(incoming / "bad", look, settling, "evilone")
        found, (remark,) = look()
        assert found == []
        assert all(word in remark for word in (str(incoming / "bad" / "task.toml"), kind, "no code", "[defaults]"))
    drop(incoming / "bad", task_toml='kind = "text-classification"\n')
    assert look() == (["bad"], [])
    drop(incoming / "bad", task_toml='kind = "evilone:Kind"\n')
    monkeypatch.setattr(tasks_file, "_require_no_code", lambda *_: None)
    assert code_runs(incoming / "bad", look, settling, "evilone"), "the planted bug is not seen"


def test_a_kind_in_defaults_is_the_one_beside_the_tasks_file_whatever_lies_in_the_folder(
    incoming: Path, look: Any, settling: Settling, monkeypatch: pytest.MonkeyPatch
) -> None:
    (incoming.parent / "tasks.toml").write_text(HEAD.replace("image-classification", "mineone:Kind"))
    (incoming.parent / "mineone.py").write_text(HARMLESS)
    assert not code_runs(incoming / "one", look, settling, "mineone")
    (task,) = dropped_tasks(read_tasks(incoming.parent / "tasks.toml"), settling).tasks
    assert task.kind == str(incoming.parent / "mineone:Kind")
    assert load_custom(task.kind).name == "text-classification"
    del sys.modules["mineone"]
    honest = tasks_file._beside
    monkeypatch.setattr(
        tasks_file, "_beside", lambda path, kind: kind if path.name == "tasks.toml" else honest(path, kind)
    )
    assert code_runs(incoming / "one", look, settling, "mineone"), "the planted bug is not seen"


def test_names_are_checked_and_used_once(incoming: Path, look: Any) -> None:
    drop(incoming / "good", train_npz="x", test_npz="t")
    drop(incoming / "Not A Name", train_npz="x", test_npz="t")
    (incoming.parent / "tasks.toml").write_text(
        HEAD + '[[task]]\nname = "good"\ntrain = "incoming/good/train.npz"\ntest = "incoming/good/test.npz"\n'
    )
    found, remarks = look()
    assert found == []
    assert "Not A Name" in remarks[0]
    assert "give the folder another name" in remarks[1]


def test_the_directory_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(HEAD)
    with pytest.raises(ConfigError, match="watch: expected a directory"):
        read_tasks(tmp_path / "tasks.toml")
    (tmp_path / "tasks.toml").write_text('backbone = "digits-vit"\n')
    with pytest.raises(ConfigError, match="at least one"):
        read_tasks(tmp_path / "tasks.toml")


def test_a_remark_is_told_once(incoming: Path, clock: Clock, settling: Settling) -> None:
    told: list[str] = []
    trainer = BackboneTrainer(incoming.parent / "tasks.toml", settling, told.append)
    drop(incoming / "broken", train_npz="x")
    for _ in range(4):
        assert [task for task in trainer.tasks() if task.is_whole] == []
        clock.now += watched.SETTLE_S
    assert len(told) == 1
    drop(incoming / "broken", test_npz="t")
    for _ in range(2):
        clock.now += watched.SETTLE_S
        tasks = trainer.tasks()
    assert [task.name for task in tasks] == ["broken"]
    assert len(told) == 1


def test_a_session_trains_what_is_dropped_and_survives_what_cannot_be_read(
    own_hub_class: Any, incoming: Path, tmp_path: Path
) -> None:
    backbone = load_backbone("digits-vit", "cpu")
    hub = own_hub_class(tmp_path / "server", describe_space("digits", backbone.site_weights(), k_max=8))
    hub.start()
    stop = threading.Event()
    options = SessionOptions(linger_s=60.0, poll_s=0.05)
    try:
        layout = hub.client(tmp_path / "c", "watching/main")
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(run_session, layout.root, incoming.parent / "tasks.toml", options=options, stop=stop)
            try:
                drop(incoming / "broken", train_npz="no archive", test_npz="t")
                draw = np.random.default_rng(0)
                (incoming / "digits").mkdir()
                for part in ("train", "test"):
                    x, y = draw.random((12, 8, 8), dtype=np.float32), np.arange(12) % 2
                    np.savez(incoming / "digits" / f"{part}.npz", x=x, y=y)
                seen: list[dict[str, Any]] = []
                while not work.done() and {"merged", "refused"} - {line["event"] for line in seen}:
                    time.sleep(0.05)
                    text = layout.session_log.read_text() if layout.session_log.exists() else ""
                    seen = [json.loads(line) for line in text.splitlines()]
            finally:
                stop.set()
            work.result()
    finally:
        hub.stop()
    (refused,) = [line for line in seen if line["event"] == "refused"]
    assert refused["task"] == "broken"
    assert [record.task for record in Records(layout.tasks).all() if record.heads] == ["digits"]


def test_a_folder_that_may_not_be_read_is_told_and_disturbs_no_other(
    incoming: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open", "closed"):
        drop(incoming / name, train_npz="rows", test_npz="rows")

    def guarded(*paths: Path) -> str:
        if "closed" in str(paths[0]):
            raise ConfigError(f"{paths[0]}: cannot read the data file: permission denied")
        return content_hash(*paths)

    monkeypatch.setattr("share_client.trainer.content_hash", guarded)
    said: list[str] = []
    trainer = BackboneTrainer(incoming.parent / "tasks.toml", None, said.append)
    for _ in range(2):
        assert [task.name for task in trainer.tasks()] == ["open"]
    assert [text.rpartition(": ")[2] for text in said] == ["permission denied"]


def test_files_that_may_not_be_looked_at_are_told_and_not_waited_for(
    incoming: Path, settling: Settling, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(incoming / "closed", train_npz="rows", test_npz="rows")

    def refused(path: Path) -> Any:
        raise ConfigError(f"{path}: cannot list the data") from PermissionError(13, "permission denied")

    monkeypatch.setattr(watched, "stamps", refused)
    found = dropped_tasks(read_tasks(incoming.parent / "tasks.toml"), settling)
    assert (found.filling, len(found.remarks)) == ((), 1)


def test_the_code_of_an_own_kind_and_the_device_are_part_of_an_attempt(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text("first = 1\n")
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text("{}\n")
    path = tmp_path / "tasks.toml"
    path.write_text(
        'backbone = "digits-vit"\ndevice = "cpu"\n[[task]]\nname = "t"\nkind = "ranks:Ranks"\n'
        'train = "train.jsonl"\ntest = "test.jsonl"\n'
    )

    def attempt(trainer: BackboneTrainer) -> str:
        (task,) = trainer.tasks()
        assert task.made_by.startswith(str(read_tasks(path).backbone) + " on cpu ")
        return task.attempt

    loaded = BackboneTrainer(path)
    before = attempt(loaded)
    (tmp_path / "ranks.py").write_text("second = 2\n")
    assert attempt(loaded) == before, "a process goes on with the code that it has imported"
    assert attempt(BackboneTrainer(path)) != before
    (tmp_path / "ranks.py").unlink()
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "__init__.py").write_text("second = 2\n")
    assert len({before, attempt(BackboneTrainer(path))}) == 2
