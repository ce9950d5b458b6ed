"""What goes wrong with one task stays with that task, is told, and is tried again when that may help."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from share_client import attempts as attempts_module
from share_client import outbox as outbox_module
from share_client import session as session_module
from share_client.attempts import MOST_FAILURES, Attempts, may_pass, reason_of
from share_client.history import client_history
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_client.outbox import Outbox, Training
from share_client.records import Records
from share_client.restored import forget_lost
from share_client.session import SessionOptions, run_session
from share_client.session_log import SessionLog
from share_client.status import client_status, print_status
from share_client.tasks_file import TaskConfig
from share_client.trainer import LocalTask, Measured
from share_core.errors import ConfigError, StorageError, UnknownUpdateError
from share_core.types import Adapter
from share_proto.v1 import hub_pb2

OPTIONS = SessionOptions(linger_s=0.3, poll_s=0.02, lock_s=0.5)


def events(layout: ClientLayout, *wanted: str) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in layout.session_log.read_text().splitlines()]
    return [(line["event"], line.get("task", "")) for line in lines if line["event"] in wanted]


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "no space left on device")


def failing(fake: Any, error: Exception | None, only: str = "bad") -> type[Any]:
    """A trainer whose training of the task ``only`` raises ``error``; ``tries`` counts."""

    class Failing(fake.FakeTrainer):  # type: ignore[misc]
        tries = 0

        def train(self, task: LocalTask, *rest: Any) -> Any:
            if task.name == only and error is not None:
                type(self).tries += 1
                raise error
            return super().train(task, *rest)

    return Failing


def run(layout: ClientLayout, trainer: Any) -> Any:
    path = layout.root / "tasks.json"
    return run_session(layout.root, path, trainer=trainer(path), options=OPTIONS)


def write(layout: ClientLayout, *names: str) -> None:
    (layout.root / "tasks.json").write_text(json.dumps({name: f"the data of {name}" for name in names}))


def test_a_training_that_crashes_ends_no_session_and_is_given_up_in_the_end(
    hub: Any, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "AGAIN_S", 0.0)
    layout = hub.client(tmp_path / "c", "crashing/main")
    write(layout, "bad", "good")
    trainer = failing(fake, ZeroDivisionError("float division by zero"))
    run(layout, trainer)
    run(layout, trainer)
    assert trainer.tries == MOST_FAILURES
    told = [("broken_off", "bad")] * (MOST_FAILURES - 1) + [("refused", "bad")]
    assert events(layout, "broken_off", "refused", "failed") == told
    assert events(layout, "merged") == [("merged", "good")]
    reason = Records(layout.tasks).get("bad").refused_reason
    assert reason.startswith("ZeroDivisionError at test_troubled_sessions.py, line ")
    assert reason.endswith(f", in train ({MOST_FAILURES} times in a row)"), "and none of its words, which may be rows"


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "no space left"), torch.OutOfMemoryError("x")])
def test_what_broke_off_waits_also_for_the_next_session_while_others_go_on(
    hub: Any,
    fake: Any,
    tmp_path: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = hub.client(tmp_path / "c", f"passing-{type(error).__name__.lower()}/main")
    write(layout, "bad", "good")
    trainer = failing(fake, error)
    for _ in range(2):
        run(layout, trainer)
    assert trainer.tries == 1
    assert events(layout, "broken_off", "refused", "failed", "merged") == [("broken_off", "bad"), ("merged", "good")]
    print_status(client_status(layout))
    assert "broke off" in capsys.readouterr().out
    (broken,) = [task["broken_off"] for task in client_status(layout)["tasks"] if task["broken_off"]]
    assert (broken["times"], type(error).__name__ in broken["reason"]) == (1, True)
    monkeypatch.setattr(attempts_module, "LONGEST_S", 0.0)
    run(layout, fake.FakeTrainer)
    assert events(layout, "merged") == [("merged", "good"), ("merged", "bad")]


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(attempts_module, "time", clock)
    return clock


def waits(attempts: Attempts, task: LocalTask, clock: Clock) -> float:
    """Return after how many seconds a task is open again, to the second, and move the clock there."""
    for waited in range(4000):
        if attempts.is_open(task):
            return waited
        clock.now += 1.0
    return math.inf


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SessionLog]:
    with contextlib.closing(SessionLog(tmp_path / "session.jsonl")) as opened:
        yield opened


def test_waits_double_up_to_an_hour_and_outlive_the_session(tmp_path: Path, clock: Clock, log: SessionLog) -> None:
    task, seen = LocalTask("t", "hash"), []
    for _ in range(9):
        Attempts(Records(tmp_path), log).failed(task, MemoryError())
        seen.append(waits(Attempts(Records(tmp_path), log), task, clock))
    assert seen == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600], "and it is never given up"


def test_another_attempt_does_not_wait_for_an_earlier_one_nor_count_its_failures(
    tmp_path: Path, clock: Clock, log: SessionLog
) -> None:
    attempts = Attempts(Records(tmp_path), log)
    for _ in range(MOST_FAILURES - 1):
        attempts.failed(LocalTask("t", "hash"), ZeroDivisionError("x"))
    assert not attempts.is_open(LocalTask("t", "hash"))
    assert attempts.is_open(LocalTask("t", "other data"))
    attempts.failed(LocalTask("t", "other data"), ZeroDivisionError("x"))
    assert Records(tmp_path).get("t").broken_off.times == 1
    clock.now -= 10 * attempts_module.LONGEST_S
    assert attempts.is_open(LocalTask("t", "other data")), "a clock that was wrong keeps nobody waiting"


def test_a_device_that_is_lost_ends_the_session_and_is_counted_against_one_task(
    hub: Any, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same process every other task would fail too, by no fault of its own."""
    layout = hub.client(tmp_path / "c", "device/main")
    write(layout, "bad", "good")
    trainer = failing(fake, torch.AcceleratorError("CUDA error: device-side assert triggered"))
    with pytest.raises(torch.AcceleratorError):
        run(layout, trainer)
    assert events(layout, "broken_off", "failed", "merged") == [("broken_off", "bad"), ("failed", "")]
    run(layout, trainer)
    assert events(layout, "merged") == [("merged", "good")], "the other waits, so this one gets its turn"


def test_what_is_about_more_than_one_task_ends_the_session_and_is_told(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "storage/main")
    write(layout, "bad", "good")
    with pytest.raises(StorageError):
        run(layout, failing(fake, StorageError("no log, no sending")))
    assert events(layout, "failed", "merged") == [("failed", "")]


def test_a_failure_of_any_kind_is_in_the_log(
    hub: Any, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = hub.client(tmp_path / "c", "unexpected/main")
    write(layout, "good")

    def lost(*_: Any) -> Any:
        raise ValueError("not expected by anybody")

    monkeypatch.setattr(session_module, "encode_update", lost)
    with pytest.raises(ValueError, match="not expected by anybody"):
        run(layout, fake.FakeTrainer)
    assert events(layout, "failed") == [("failed", "")]


def test_nothing_is_spent_on_what_the_disk_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox, ready = Outbox(tmp_path / "outbox"), []
    training = Training("t", "hash", 1, loss=0.0, steps=1, seconds=0.0, rows=1)

    def put() -> Any:
        return outbox.put(
            b"payload", b"head", training, space_id="s", task_id="o/t", create=True, ready=lambda: ready.append(seen())
        )

    def seen() -> int:
        return len(outbox.entries())

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(outbox_module, "write_flushed", full)
        put()
    assert ready == []
    assert [path.name for path in (tmp_path / "outbox").iterdir()] == ["refused"]
    put()
    assert ready == [0], "before anybody sees the entry"
    assert seen() == 1


def test_what_may_pass_is_told_from_broken_files_and_mistakes() -> None:
    def caused(cause: Exception) -> ConfigError:
        error = ConfigError("cannot be read")
        error.__cause__ = cause
        return error

    assert may_pass(caused(ModuleNotFoundError("no module named 'pyarrow'")))
    assert may_pass(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert may_pass(caused(FileNotFoundError(errno.ENOENT, "no such file")))
    assert not may_pass(caused(OSError("cannot identify image file")))
    assert not may_pass(ConfigError("lower learning_rate"))
    assert not may_pass(ValueError("shape"))
    assert reason_of(ConfigError("lower learning_rate")) == "lower learning_rate"
    assert "set checkpointing" in reason_of(torch.OutOfMemoryError("CUDA out of memory"))


def test_a_refused_attempt_is_made_again_when_data_or_a_setting_changes(tmp_path: Path) -> None:
    config = TaskConfig("t", "text-classification", tmp_path / "train.jsonl", tmp_path / "test.jsonl", patience=2)
    task = LocalTask("t", "hash", config, made_by="minilm on cpu")
    records = Records(tmp_path / "tasks")
    records.refused("t", task.attempt, "patience needs at least 2 rows")
    records = Records(tmp_path / "tasks")

    def wants(one: LocalTask) -> bool:
        return records.get("t").wants(one.content_hash, one.attempt)

    assert not wants(task)
    assert not wants(replace(task, config=replace(config))), "nothing has changed"
    assert wants(replace(task, config=replace(config, patience=None)))
    assert wants(replace(task, content_hash="other"))
    assert wants(replace(task, made_by="minilm on cuda"))


class Unmeasurable:
    """Fails to evaluate one task, and calls its metric by another name than accuracy."""

    def evaluate(self, task: LocalTask, adapter: Adapter, head: Mapping[str, Any]) -> Measured:
        if task.name == "bad":
            raise ConfigError("bad: expected at least two classes, got one")
        return Measured("micro-f1", 0.5, 50)


def test_a_task_that_cannot_be_evaluated_is_told_once_and_others_are(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "unmeasured/main")
    write(layout, "bad", "good", "better")
    trainer = type("Trainer", (Unmeasurable, fake.FakeTrainer), {})
    counters = run(layout, trainer)
    assert counters.merged == 3
    assert events(layout, "unmeasured") == [("unmeasured", "bad")]
    assert {task for _, task in events(layout, "evaluation")} == {"good", "better"}


def test_a_version_is_evaluated_once_whatever_the_metric_is_called(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "metrics/main")
    write(layout, "good")
    trainer = type("Trainer", (Unmeasurable, fake.FakeTrainer), {})
    assert run(layout, trainer).evaluated == 1
    assert [run(layout, trainer).evaluated for _ in range(2)] == [0, 0]


def test_versions_that_came_meanwhile_are_evaluated_for_folders_too(own_hub: Any, fake: Any, tmp_path: Path) -> None:
    """At the start of a session a dropped folder is not known to be whole, and versions wait already."""
    layout, other = (own_hub.client(tmp_path / name, f"{name}/main") for name in ("ours", "theirs"))

    class Dropped(fake.FakeTrainer):  # type: ignore[misc]
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.whole_at = time.monotonic() + 1.0

        def tasks(self) -> Sequence[LocalTask]:
            is_whole = time.monotonic() > self.whole_at
            return [replace(task, is_whole=is_whole, dropped=True) for task in super().tasks()]

    write(layout, "folder")
    run(layout, Dropped)
    for number in range(3):
        write(other, *(f"task{n}" for n in range(number + 1)))
        run(other, fake.FakeTrainer)
    run(layout, Dropped)
    lines = Records(layout.tasks).history("folder")
    assert [line["version"] for line in lines if line["event"] == "evaluation"] == [1, 2, 3, 4]


def test_what_a_restored_hub_has_lost_is_trained_again(
    own_hub: Any, fake: Any, tmp_path: Path, connect: Callable[..., HubLink]
) -> None:
    layout, other = (own_hub.client(tmp_path / name, f"{name}/main") for name in ("ours", "theirs"))
    write(layout, "kept")
    run(layout, fake.FakeTrainer)
    own_hub.stop()
    shutil.copytree(own_hub.layout.root, tmp_path / "backup")
    own_hub.start()
    write(layout, "kept", "lost")
    run(layout, fake.FakeTrainer)
    own_hub.stop()
    shutil.rmtree(own_hub.layout.root)
    shutil.copytree(tmp_path / "backup", own_hub.layout.root)
    own_hub.start()
    write(other, "theirs")
    run(other, fake.FakeTrainer)  # which takes the number of the version that is lost
    shutil.rmtree(layout.cache)
    run(layout, fake.FakeTrainer)
    held = {task.task_id for task in connect(layout).list_tasks().tasks}
    assert held == {"ours/kept", "ours/lost", "theirs/theirs"}
    assert events(layout, "lost") == [("lost", "lost")]
    assert [head.version for head in Records(layout.tasks).get("lost").heads] == [3]
    assert [head.version for head in Records(layout.tasks).get("kept").heads] == [1]
    rows = {task["task"]: [row["version"] for row in task["rows"]] for task in client_history(layout)["tasks"]}
    assert rows == {"kept": [1, 2, 3], "lost": [3]}
    assert run(layout, fake.FakeTrainer).submitted == 0


def test_a_folder_that_is_never_at_rest_is_told_once(
    hub: Any, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "FILLING_S", 0.1)
    layout = hub.client(tmp_path / "c", "filling/main")
    write(layout, "growing", "whole")

    class Filling(fake.FakeTrainer):  # type: ignore[misc]
        looks = 0

        def tasks(self) -> Sequence[LocalTask]:
            self.looks += 1
            return [replace(one, is_whole=one.name == "whole" or self.looks > 40) for one in super().tasks()]

    run(layout, Filling)
    told = [line for line in layout.session_log.read_text().splitlines() if "growing: its files are still" in line]
    assert len(told) == 1
    assert events(layout, "merged") == [("merged", "whole"), ("merged", "growing")]


@pytest.mark.parametrize(
    ("state", "version", "kept"),
    [
        ("MERGED", 5, [3, 5]),
        ("MERGED", 9, [3, 9]),
        ("ACCEPTED", 0, [3, 5]),
        ("QUARANTINED", 0, [3, 5]),
        ("FORGOTTEN", 0, [3, 5]),
        ("REFUSED", 0, [3]),
        ("", 0, [3]),
    ],
)
def test_only_what_a_hub_does_not_have_any_more_counts_as_lost(
    tmp_path: Path, log: SessionLog, state: str, version: int, kept: list[int]
) -> None:
    """What it will merge again must not be sent twice; what its operator has forgotten must not come back."""
    records = Records(tmp_path / "tasks")
    for number in (3, 5):
        records.merged("t", f"data {number}", number, f"head {number}".encode(), update_id=f"u{number}")
        records.add_history("t", {"event": "merged", "update_id": f"u{number}", "version": number})
        records.add_history("t", {"event": "evaluation", "metric": "accuracy", "value": 0.5, "version": number})

    class Link:
        def get_update(self, update_id: str) -> Any:
            if update_id == "u5" and not state:
                raise UnknownUpdateError("no such update")
            name = "MERGED" if update_id == "u3" else state
            return SimpleNamespace(
                state=getattr(hub_pb2, f"UPDATE_STATE_{name}"), version=3 if update_id == "u3" else version
            )

    forget_lost(records, cast(HubLink, Link()), 6, threading.Event(), lambda error: None, log)
    records = Records(tmp_path / "tasks")
    heads = records.get("t").heads
    assert [head.version for head in heads] == kept
    assert [records.head_bytes("t", head) for head in heads] == [b"head 3", b"head 5"][: len(kept)]
    assert records.is_evaluated("t", 5) == (5 in kept or version == 9)
    assert [head.content_hash for head in heads] == ["data 3", "data 5"][: len(kept)]


def test_a_kill_while_losses_are_written_down_leaves_them_to_be_found_again(
    tmp_path: Path, log: SessionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "tasks")
    for task in ("one", "two"):
        records.merged(task, "data", 5, b"head", update_id=task)
        records.add_history(task, {"event": "evaluation", "metric": "accuracy", "value": 0.5, "version": 5})

    class Link:
        def get_update(self, update_id: str) -> Any:
            raise UnknownUpdateError("no such update")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    def forget() -> Records:
        fresh = Records(tmp_path / "tasks")
        forget_lost(fresh, cast(HubLink, Link()), 9, threading.Event(), lambda error: None, log)
        return Records(tmp_path / "tasks")

    for step in ("add_history", "lost"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Records, step, killed)
            forget()
    found = forget()
    for task in ("one", "two"):
        assert (found.get(task).heads, found.is_evaluated(task, 5), found.history(task)) == ((), False, [])
