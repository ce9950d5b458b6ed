"""What private trainings spend: declared to the hub, counted here before anything leaves, refused beyond the budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from share_client import session as session_module
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_client.outbox import Entry, Outbox, Training
from share_client.privacy_table import PrivacyConfig
from share_client.rebase import Rebaser, kept_adapter
from share_client.session import SessionCounters, SessionOptions, run_session
from share_client.spending import Spending
from share_client.status import client_status
from share_client.tasks_file import TaskConfig
from share_client.trainer import BackboneTrainer, LocalTask, Trained
from share_core.errors import ConfigError
from share_core.privacy import CoefficientNoise, SampleNoise, declaration_to_text, gaussian_epsilon
from share_core.types import Core, SiteBasis, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import decode_update, encode_update
from share_proto.v1 import hub_pb2

OPTIONS = SessionOptions(linger_s=1.0, poll_s=0.02, lock_s=5.0)
NOISE = CoefficientNoise(noise_multiplier=4.0, clip=1.0, delta=1e-6)
SAMPLES = SampleNoise(2.0, 1e-5, 1.1, 1.0, 60, 1.0)
PRIVACY = PrivacyConfig(noise_multiplier=1.1, delta=1e-5, report_metrics=True)


@pytest.fixture
def private_trainer(fake: Any) -> Callable[..., Any]:
    """Return a maker of trainers whose tasks have a ``[privacy]`` table and declare ``SAMPLES``."""

    class Private(fake.FakeTrainer):  # type: ignore[misc]
        def __init__(self, path: Path, privacy: PrivacyConfig) -> None:
            super().__init__(path)
            self.privacy = privacy

        def tasks(self) -> Sequence[LocalTask]:
            config = TaskConfig("t", "text-classification", Path("a"), Path("b"), privacy=self.privacy, batch_size=100)
            return [replace(task, config=replace(config, name=task.name)) for task in super().tasks()]

        def train(self, *arguments: Any) -> Trained:
            made: Trained = super().train(*arguments)
            return replace(made, declared=SAMPLES)

    return Private


def work(layout: ClientLayout, trainer: Any, **tasks: str) -> SessionCounters:
    trainer.path.write_text(json.dumps(tasks))
    return run_session(layout.root, trainer.path, trainer=trainer, options=OPTIONS)


def evaluations(link: HubLink, organisation: str) -> list[Any]:
    found = link.hub.ListEvaluations(hub_pb2.ListEvaluationsRequest()).evaluations
    return [one for one in found if one.task_id.startswith(f"{organisation}/")]


def test_what_is_declared_reaches_the_hub_and_the_status(
    hub: Any, private_trainer: Any, tmp_path: Path, connect: Callable[..., HubLink]
) -> None:
    layout = hub.client(tmp_path / "c", "spending/main")
    trainer = private_trainer(layout.root / "tasks.json", replace(PRIVACY, report_metrics=False))
    assert work(layout, trainer, first="data").merged == 1
    link = connect(layout)
    (record,) = link.list_updates(0, 10).updates
    assert record.privacy == declaration_to_text(SAMPLES)
    assert evaluations(link, "spending") == [], "metrics of a private task were reported"
    (task,) = client_status(layout)["tasks"]
    assert task["spent"]["epsilon"] == gaussian_epsilon([(1.1, 60)], 1e-5)
    (merge, *measured) = task["history"]
    assert merge["privacy"] == record.privacy
    assert measured, "a private task is measured all the same"
    trainer.privacy = PRIVACY
    assert work(layout, trainer, first="other data").evaluated >= 1
    assert evaluations(link, "spending")
    after = client_status(layout)["tasks"][0]["spent"]
    assert after["epsilon"] == gaussian_epsilon([(1.1, 120)], 1e-5)


def test_nothing_is_trained_beyond_the_budget(
    hub: Any, private_trainer: Any, tmp_path: Path, connect: Callable[..., HubLink]
) -> None:
    layout = hub.client(tmp_path / "c", "budget/main")
    once = gaussian_epsilon([(1.1, 3)], 1e-5)  # what this table declares: 3 epochs of one step that takes all 100 rows
    trainer = private_trainer(layout.root / "tasks.json", replace(PRIVACY, budget=once))
    Spending(layout.tasks).add("second", SAMPLES)
    counters = work(layout, trainer, first="data", second="data two")
    assert (counters.submitted, counters.merged) == (1, 1)
    (record,) = connect(layout).list_updates(0, 10).updates
    assert record.task_id == "budget/first"
    tasks = {task["task"]: task for task in client_status(layout)["tasks"]}
    assert "privacy budget is spent" in tasks["second"]["refused_reason"]


def spent_and_left(layout: ClientLayout) -> tuple[int, int]:
    """Return (trainings counted, updates in the outbox)."""
    path = layout.tasks / "only" / "spent.jsonl"
    spent = len(path.read_text().splitlines()) if path.exists() else 0
    return spent, len(Outbox(layout.outbox).entries())


class Killed(BaseException):
    """The process ends here."""


def kill_at_every_step(layout: ClientLayout, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let sessions die at each durable step of the outbox; return what each left."""
    found = []
    for name in ("write payload.safetensors", "rename entry", "put done"):

        def step(reached: str, name: str = name) -> None:
            if reached == name:
                raise Killed

        monkeypatch.setattr(session_module, "Outbox", lambda directory, step=step: Outbox(directory, step))
        with pytest.raises(Killed):
            work(layout, trainer, only="the data")
        found.append(spent_and_left(layout))
        for entry in Outbox(layout.outbox).entries():
            Outbox(layout.outbox).remove(entry)
    return found


def test_a_training_is_counted_before_it_can_leave(
    hub: Any, private_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = hub.client(tmp_path / "c", "counted/main")
    trainer = private_trainer(layout.root / "tasks.json", PRIVACY)
    # Nothing is spent on what is not on the disk, and everything that can leave is counted.
    assert kill_at_every_step(layout, trainer, monkeypatch) == [(0, 0), (1, 0), (2, 1)]
    monkeypatch.setattr(Spending, "add", lambda *_: {"epsilon": 0.0, "delta": 0.1})
    other = hub.client(tmp_path / "other", "uncounted/main")
    trainer = private_trainer(other.root / "tasks.json", PRIVACY)
    assert kill_at_every_step(other, trainer, monkeypatch)[-1] == (0, 1), "an uncounted update was not noticed"


def test_without_bases_noise_on_coefficients_waits(
    own_hub: Any, private_trainer: Any, fake: Any, tmp_path: Path
) -> None:
    layout = own_hub.client(tmp_path / "c", "waits/main")
    privacy = PrivacyConfig(mechanism="coefficients", noise_multiplier=4.0)
    trainer = private_trainer(layout.root / "tasks.json", privacy)
    counters = work(layout, trainer, only="the data")
    assert (counters.submitted, counters.idle) == (0, True)
    assert client_status(layout)["tasks"] == [], "nothing was refused: it is trained when there are bases"


def entry_of(box: Outbox, payload: bytes, adapter: bytes, declared: Any) -> Entry:
    training = Training("t", "hash", base_version=1, loss=0.1, steps=1, seconds=1.0, rows=500)
    return box.put(payload, b"", training, space_id="s", task_id="o/t", create=True, adapter=adapter, declared=declared)


def test_expressed_anew_noise_on_coefficients_still_sends_nothing_else(spec: SpaceSpec, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    bases = {
        name: SiteBasis(
            torch.linalg.qr(torch.randn(site.d_out, 3, generator=draw)).Q,
            torch.linalg.qr(torch.randn(site.d_in, 3, generator=draw)).Q,
        )
        for name, site in spec.sites.items()
    }
    old, new = (
        Space(1, bases, {}),
        Space(5, {n: SiteBasis(b.left[:, :2], b.right[:, :2]) for n, b in bases.items()}, {}),
    )
    cores = {name: Core(torch.randn(3, 3, generator=draw), torch.randn(3, 3, generator=draw)) for name in bases}
    update = Update(1, {name: SiteUpdate(core=core) for name, core in cores.items()})
    box = Outbox(tmp_path / "outbox")
    made = {}
    for declared in (NOISE, None):
        entry = entry_of(box, encode_update(update), kept_adapter(update, old), declared)
        assert entry.submission.rows == (0 if declared else 500)
        expressed = Rebaser(spec, lambda: new, lambda: (5, 4)).express(entry)
        assert expressed is not None
        made[declared is None] = decode_update(expressed.payload, spec)
        fresh = box.rebase(entry, expressed.payload, 5, False, expressed.adapter)
        assert fresh.submission.privacy == ("" if declared is None else declaration_to_text(NOISE))
    assert all(part.residual is None for part in made[False].sites.values())
    assert any(part.residual is not None for part in made[True].sites.values()), "the other way is not what is tested"


def test_another_table_asks_for_another_training(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "x"}\n')
    body = '[[task]]\nname = "t"\nkind = "text-classification"\ntrain = "a.jsonl"\ntest = "a.jsonl"\n'
    hashes = set()
    for privacy in ("", "[privacy]\nepsilon = 1\n", "[privacy]\nepsilon = 1\nbudget = 5\n"):
        path = tmp_path / "tasks.toml"
        path.write_text(f'backbone = "minilm"\n{privacy}{body}')
        (task,) = BackboneTrainer(path).tasks()
        hashes.add(task.content_hash)
    assert len(hashes) == 3


def test_a_missing_package_refuses_the_file_and_not_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "x"}\n')
    body = '[[task]]\nname = "t"\nkind = "text-classification"\ntrain = "a.jsonl"\ntest = "a.jsonl"\n'
    (tmp_path / "tasks.toml").write_text(f'backbone = "minilm"\n[privacy]\nepsilon = 1\n{body}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"opacus and dp_accounting: pip install"):
        BackboneTrainer(tmp_path / "tasks.toml").tasks()


def test_a_budget_names_what_was_spent(tmp_path: Path) -> None:
    spending = Spending(tmp_path)
    task = TaskConfig("t", "text-classification", Path("a"), Path("b"), privacy=replace(PRIVACY, budget=100.0))
    spending.check(task, 100)
    assert spending.total("t") is None
    for _ in range(3):
        spending.add("t", SAMPLES)
    with pytest.raises(ConfigError, match=r"3 trainings and this one come to epsilon .*, more than 100"):
        spending.check(task, 100)
    spending.check(replace(task, privacy=replace(PRIVACY, budget=None)), 100)
