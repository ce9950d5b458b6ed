"""When coefficients are learned again, when they are sent, and why that comes to an end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from share_client import refits
from share_client.link import HubLink
from share_client.privacy_table import PrivacyConfig
from share_client.records import Head, Records, TaskRecord
from share_client.refits import Refits, is_allowed, is_better, is_due
from share_client.session import SessionOptions, run_session
from share_client.session_log import SessionLog
from share_client.spending import Spending
from share_client.tasks_file import TaskConfig
from share_client.trainer import LocalTask, Refit, Trained
from share_client.training import declare
from share_core.errors import ConfigError
from share_core.privacy import COEFFICIENTS
from share_core.space import columns_of
from share_core.types import Core, SiteBasis, SiteUpdate, Space, Update

OPTIONS = SessionOptions(linger_s=0.4, poll_s=0.02, lock_s=0.5)
TASK = LocalTask("t", "data")
MERGED = TaskRecord("t", heads=(Head(3, "data"),), columns=100, captured=0.02)


def test_a_task_is_due_when_the_bases_have_grown() -> None:
    assert not is_due(MERGED, TASK, 100)
    assert not is_due(MERGED, TASK, 124)
    assert is_due(MERGED, TASK, 125)
    assert not is_due(MERGED, LocalTask("t", "other data"), 500), "changed data is trained, not refitted"
    assert not is_due(replace(MERGED, heads=()), TASK, 500)
    assert not is_due(replace(MERGED, refused_hash="data"), TASK, 500)
    assert not is_due(replace(MERGED, columns=0), TASK, 500), "of an older release, nothing to compare with"
    assert not is_due(replace(MERGED, refits=refits.MOST_REFITS), TASK, 500)


def ping_pong(most: int) -> int:
    """Two clients whose refits, against the rule that they add nothing, make the bases grow for the other one."""
    columns, tries = 20.0, 0
    records = [replace(MERGED, columns=10), replace(MERGED, columns=10)]
    while tries < most:
        due = [n for n, record in enumerate(records) if is_due(record, TASK, int(columns))]
        if not due:
            break
        tries += 1
        columns *= 1.3
        records[due[0]] = replace(records[due[0]], refits=records[due[0]].refits + 1, columns=int(columns))
    return tries


def test_two_clients_do_not_keep_each_other_busy_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ping_pong(500) == 2 * refits.MOST_REFITS
    monkeypatch.setattr(refits, "MOST_REFITS", 10**9)
    assert ping_pong(500) == 500, "the planted bug, no bound, does not go on for ever: the test shows nothing"


def test_growth_alone_bounds_the_tries_where_nothing_grows_by_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refits, "MOST_REFITS", 10**9)
    record, tries = replace(MERGED, columns=10), 0
    for columns in range(10, 2000):
        if is_due(record, TASK, columns):
            record, tries = replace(record, columns=columns), tries + 1
    assert tries <= 1 + 24, "log(2000 / 10) / log(1.25) is 23.7"


def found(before: float, after: float, noise: float, fake: Any) -> Refit:
    trained = Trained(Update(1, {}), {}, loss=0.0, steps=1, seconds=0.0, rows=1)
    return Refit(0.1, trained, before, after, noise)


def test_only_what_is_better_by_more_than_noise_is_sent(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_better(found(0.80, 0.85, 0.02, fake))
    assert not is_better(found(0.80, 0.83, 0.02, fake))
    assert not is_better(found(0.80, 0.80, 0.0, fake))
    assert not is_better(Refit(captured=0.5))
    draw = torch.Generator().manual_seed(0)

    def taken() -> int:
        """Refits that change nothing but by chance, 0.02 at a time."""
        changes = 0.02 * torch.randn(1000, generator=draw)
        return sum(is_better(found(0.8, 0.8 + float(change), 0.02, fake)) for change in changes)

    assert taken() < 45, "of 1000 chances 23 are expected beyond two standard errors"
    monkeypatch.setattr(refits, "CLEARLY", 0.0)
    assert taken() > 400, "the planted bug, no regard to noise, is not seen"


def config(**changes: Any) -> LocalTask:
    made = TaskConfig("t", "image-classification", Path("a"), Path("b"), **{"refit": True, **changes})
    return LocalTask("t", "data", made)


def test_under_noise_a_refit_needs_a_budget_and_leave_to_report() -> None:
    assert is_allowed(LocalTask("t", "data"))
    assert is_allowed(config())
    assert not is_allowed(config(refit=False))
    assert not TaskConfig("t", "image-classification", Path("a"), Path("b")).refit, "it is asked for"
    free = PrivacyConfig(noise_multiplier=1.0, report_metrics=True)
    assert not is_allowed(config(privacy=free)), "no budget"
    assert not is_allowed(config(privacy=replace(free, budget=8.0, report_metrics=False)))
    assert is_allowed(config(privacy=replace(free, budget=8.0)))


class Scripted:
    """A trainer that says what it was asked, and answers with what it was given."""

    def __init__(self, answer: Refit | ConfigError) -> None:
        self.answer = answer
        self.asked: list[float | None] = []

    def rows(self, task: LocalTask) -> int:
        return 100

    def refit(self, task: Any, space: Any, task_id: str, head: Any, before: float | None, progress: Any) -> Refit:
        self.asked.append(before)
        if isinstance(self.answer, ConfigError):
            raise self.answer
        return self.answer


@pytest.fixture
def refitting(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make the refits of a client directory in which task t was merged, and a space that has grown since."""
    log = SessionLog(tmp_path / "logs" / "session.jsonl")

    def make(answer: Any) -> Any:
        records, spending = Records(tmp_path), Spending(tmp_path)
        if not records.get("t").heads:
            records.merged("t", "data", 1, safetensors.torch.save({}), columns=4, captured=0.1)
        trainer: Any = Scripted(answer)
        basis = SiteBasis(torch.eye(12)[:, :6], torch.eye(8)[:, :6])
        space = Space(5, {"one": basis}, {"org/t": {}})
        return Refits(trainer, records, spending, log), trainer, records, spending, space

    yield make
    log.close()


def test_under_noise_every_try_is_spent_and_gradients_are_left_alone(refitting: Any) -> None:
    privacy = PrivacyConfig(COEFFICIENTS, noise_multiplier=4.0, clip=1.0, budget=2.0, report_metrics=True)
    task = config(privacy=privacy)
    assert task.config is not None
    declared = declare(task.config, 100)
    worse = replace(found(0.8, 0.7, 0.01, None).trained, declared=declared)  # type: ignore[type-var]
    made, trainer, records, spending, space = refitting(Refit(0.0, worse, 0.8, 0.7, 0.01))

    def due() -> LocalTask | None:
        answer: LocalTask | None = made.next([task], space, lambda task: f"org/{task.name}")
        return answer

    assert due() == task
    assert made.run(task, space, "org/t", lambda step: None) is None
    assert trainer.asked == [None]
    assert spending.total("t")["epsilon"] > 0, "what was not sent was looked at as well"
    records.merged("t", "new", 6, b"", columns=4)
    records.merged("t", "data", 7, b"", columns=4)
    assert due() == task
    for _ in range(20):
        spending.add("t", declared)
    assert due() is None, "the budget is spent"


def test_a_refit_that_cannot_be_done_is_counted_and_ends_nothing(refitting: Any) -> None:
    made, _, records, _, space = refitting(ConfigError("the head does not fit"))
    assert made.run(config(), space, "org/t", lambda step: None) is None
    assert records.get("t").refits == 1
    assert made.next([config()], space, lambda task: "org/t") is None


def test_a_count_of_refits_survives_merges_of_refits_only(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.merged("t", "data", 1, b"", columns=10, captured=0.1)
    records.not_refitted("t", 14)
    assert (records.get("t").refits, records.get("t").columns, records.get("t").captured) == (1, 14, 0.1)
    records.merged("t", "data", 5, b"", refit=True, columns=20, captured=0.2)
    records.merged("t", "data", 5, b"", refit=True, columns=20, captured=0.2)
    again = Records(tmp_path).get("t")
    assert (again.refits, again.columns, again.captured) == (2, 20, 0.2)
    records.merged("t", "new data", 7, b"", columns=30, captured=0.3)
    assert records.get("t").refits == 0


@pytest.fixture
def eager(fake: Any) -> Any:
    """A trainer whose every refit is far better, and counts them."""

    class Eager(fake.FakeTrainer):  # type: ignore[misc]
        def train(self, *arguments: Any) -> Trained:
            trained: Trained = super().train(*arguments)
            return replace(trained, columns=4, captured=0.1)

        def refit(self, task: Any, space: Any, task_id: str, head: Any, before: Any, progress: Any) -> Refit:
            assert before == 0.1
            assert float(head["seed"]) == int(task.content_hash[:8], 16) % 1000
            with (self.path.parent / "refitted.jsonl").open("a") as file:
                file.write(json.dumps({"task": task.name, "version": space.version}) + "\n")
            cores = {site: SiteUpdate(core=Core(2 * core.out, core.in_)) for site, core in space.cores[task_id].items()}
            columns = columns_of(space.bases)
            trained = Trained(
                Update(space.version, cores), head, 0.1, steps=1, seconds=0.0, rows=9, columns=columns, captured=0.1
            )
            return Refit(0.5, trained, before=0.5, after=0.9, noise=0.01)

    return Eager


@pytest.fixture
def lines() -> Callable[[Path], Iterator[dict[str, Any]]]:
    return lambda path: (json.loads(line) for line in path.read_text().splitlines()) if path.exists() else iter(())


def test_coefficients_are_refitted_when_others_have_made_the_space_grow(
    own_hub: Any, eager: Any, lines: Any, tmp_path: Path, connect: Callable[..., HubLink]
) -> None:
    layouts = [own_hub.client(tmp_path / name, f"{name}/main") for name in ("early", "late")]

    def work(layout: Any, **changes: Any) -> Any:
        path = layout.root / "tasks.json"
        return run_session(layout.root, path, trainer=eager(path), options=replace(OPTIONS, **changes))

    for layout, names in zip(layouts, (["a"], ["b", "c", "d"]), strict=True):
        (layout.root / "tasks.json").write_text(json.dumps(dict.fromkeys(names, layout.root.name)))
    assert work(layouts[0]).merged == 1
    assert list(lines(layouts[0].root / "refitted.jsonl")) == [], "nobody else has added anything"
    with ThreadPoolExecutor(2) as pool:
        early, late = pool.map(lambda layout: work(layout, linger_s=1.0), layouts)
    again = [work(layout) for layout in layouts]
    assert early.idle
    assert late.idle
    assert [one.merged for one in again] == [0, 0], "refits go on although nothing grows"
    tries = [len(list(lines(layout.root / "refitted.jsonl"))) for layout in layouts]
    assert 1 <= tries[0] <= refits.MOST_REFITS
    records = Records(layouts[0].tasks)
    merges = [line for line in records.history("a") if line["event"] == "merged"]
    assert [line["refit"] for line in merges] == [False] + [True] * tries[0]
    assert merges[0]["why"] == "it was new"
    assert merges[1]["why"] == "the subspace had grown"
    updates = {task.task_id: task.updates for task in connect(layouts[0]).list_tasks().tasks}
    assert updates["early/a"] == 1 + tries[0]
