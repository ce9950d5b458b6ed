"""Several organisations learn one task: its owner shares it, others name the owner, and nobody else gets in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from share_client import others_tasks
from share_client.backbones import load_backbone
from share_client.heads import fetch_head
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_client.others_tasks import OthersTasks
from share_client.records import Records
from share_client.session import SessionCounters, SessionOptions, run_session
from share_client.sharing import EVERYBODY, schema_digest
from share_client.tasks_file import TaskConfig
from share_client.trainer import BackboneTrainer, LocalTask, Trained
from share_client.uploading import Submission
from share_core.errors import UnavailableError
from share_core.fingerprint import describe_space
from share_core.types import SharedHead, Space
from share_proto.v1 import hub_pb2

OPTIONS = SessionOptions(linger_s=0.2, poll_s=0.02, lock_s=0.5)
SCHEMA = "5c" * 32


@pytest.fixture
def joined(hub: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], tuple[ClientLayout, str]]:
    """Return a function that enrols a client of a named organisation; every test has organisations of its own."""
    digest = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    made: dict[str, tuple[ClientLayout, str]] = {}

    def join(name: str) -> tuple[ClientLayout, str]:
        organisation = f"{name}-{digest}"
        if name not in made:
            made[name] = (hub.client(tmp_path / name, f"{organisation}/main"), organisation)
        return made[name]

    return join


@pytest.fixture
def work(fake: Any) -> Callable[..., SessionCounters]:
    """Return a function (directory, schema, task=data, ...) that runs one session over tasks with these keys."""

    def run(layout: ClientLayout, tasks: Mapping[str, Mapping[str, Any]], schema: str = SCHEMA) -> SessionCounters:
        class Sharing(fake.FakeTrainer):  # type: ignore[misc]
            def tasks(self) -> Sequence[LocalTask]:
                return [
                    replace(one, config=TaskConfig(name=one.name, kind="fake", train=Path(), **tasks[one.name]))
                    for one in super().tasks()
                ]

            def train(
                self, task: LocalTask, space: Space, task_id: str, progress: Any, shared: SharedHead | None = None
            ) -> Trained:
                trained: Trained = super().train(task, space, task_id, progress, shared)
                return replace(trained, schema_sha256=schema)

        path = layout.root / "tasks.json"
        path.write_text(json.dumps({name: f"{name} of {layout.root.name} for {schema}" for name in tasks}))
        return run_session(layout.root, path, trainer=Sharing(path), options=OPTIONS)

    return run


def log(layout: ClientLayout, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in layout.session_log.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def counted(link: HubLink, task_id: str) -> int:
    """Return how many updates of a task are in the space."""
    return sum(one.updates for one in link.list_tasks().tasks if one.task_id == task_id)


@pytest.mark.parametrize("all_may", [False, True])
def test_who_is_named_contributes_and_nobody_else(joined: Any, work: Any, connect: Any, all_may: bool) -> None:
    (owner, acme), (named, lab), (outsider, _) = (joined(name) for name in ("acme", "lab", "zoo"))
    assert work(owner, {"x": {"share_with": (EVERYBODY,) if all_may else (lab,)}}).merged == 1
    assert work(named, {"x": {"owner": acme}}).merged == 1
    tried = work(outsider, {"x": {"owner": acme}, "mine": {}})
    link = connect(owner)
    assert counted(link, f"{acme}/x") == (3 if all_may else 2)
    assert (tried.merged, tried.submitted, tried.refused, tried.idle) == (1 + all_may, 1 + all_may, 0, True)
    assert [line["task"] for line in log(outsider, "training")] == (["x", "mine"] if all_may else ["mine"])
    told = log(outsider, "closed")
    assert len(told) == (not all_may), "once, though the session looked at it many times"
    assert all(f"ask {acme} to make another task whose share_with names zoo-" in line["reason"] for line in told)


def test_what_its_owner_has_not_made_waits_and_is_never_made_by_others(joined: Any, work: Any, connect: Any) -> None:
    (owner, acme), (named, lab) = joined("acme"), joined("lab")
    tried = work(named, {"x": {"owner": acme}, "mine": {}})
    assert (tried.merged, tried.refused) == (1, 0), "its other task"
    (told,) = log(named, "closed")
    assert told["task"] == "x"
    for said in (f"there is no task {acme}/x yet", f"only {acme} can make it", f"share_with naming {lab}"):
        assert said in told["reason"]
    assert Records(named.tasks).get("x").refused_hash == "", "nothing is refused, so that it is tried again"
    own = work(owner, {"x": {"share_with": (lab,)}})
    again = work(named, {"x": {"owner": acme}, "mine": {}})
    assert (own.merged, again.merged) == (1, 1)
    assert counted(connect(owner), f"{acme}/x") == 2


def test_another_machine_of_the_owner_may_name_it_too_and_makes_nothing(
    hub: Any, tmp_path: Path, joined: Any, work: Any, connect: Any
) -> None:
    owner, acme = joined("acme")
    second = hub.client(tmp_path / "second", f"{acme}/second")
    assert work(second, {"x": {"owner": acme}}).submitted == 0
    assert counted(connect(owner), f"{acme}/x") == 0
    work(owner, {"x": {}})
    assert work(second, {"x": {"owner": acme}}).merged == 1


def test_later_words_of_the_owner_change_nothing(joined: Any, work: Any, connect: Any) -> None:
    (owner, acme), (named, lab), (outsider, zoo) = (joined(name) for name in ("acme", "lab", "zoo"))
    work(owner, {"x": {"share_with": (lab,)}})
    assert work(owner, {"x": {"share_with": (zoo,)}}, "6d" * 32).refused == 1, "other labels"
    updates = connect(owner).hub.ListUpdates(hub_pb2.ListUpdatesRequest()).updates
    assert [one.schema_sha256 for one in updates] == [SCHEMA]
    work(outsider, {"x": {"owner": acme}})
    assert len(log(outsider, "closed")) == 1
    assert work(named, {"x": {"owner": acme}}).merged == 1


def test_other_labels_are_refused_with_both_digests_and_the_session_goes_on(joined: Any, work: Any) -> None:
    (owner, acme), (named, lab) = joined("acme"), joined("lab")
    work(owner, {"x": {"share_with": (lab,)}})
    other = schema_digest("image-classification", (1, 0))
    done = work(named, {"x": {"owner": acme}, "mine": {}}, other)
    assert (done.refused, done.merged) == (1, 1)
    (refused,) = log(named, "refused")
    assert SCHEMA in refused["reason"]
    assert f"{other}: use the same labels in the same order" in refused["reason"]


def test_contributors_evaluate_for_themselves_and_only_the_owner_reports(joined: Any, work: Any, connect: Any) -> None:
    (owner, acme), (named, lab) = joined("acme"), joined("lab")
    work(owner, {"x": {"share_with": (lab,)}})
    assert work(named, {"x": {"owner": acme}}).evaluated == 0
    assert {line["event"] for line in Records(named.tasks).history("x")} == {"merged", "evaluation"}
    assert Records(named.tasks).get("x").id_for(lab) == f"{acme}/x"
    reported = connect(owner).hub.ListEvaluations(hub_pb2.ListEvaluationsRequest()).evaluations
    assert len([one for one in reported if one.task_id == f"{acme}/x"]) == 1


def test_who_changes_the_owner_asks_for_another_training_and_who_shares_does_not(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.zeros((4, 8, 8), np.float32), y=np.arange(4) % 2)

    def content_hash(key: str) -> str:
        (tmp_path / "tasks.toml").write_text(
            'backbone = "digits-vit"\n[[task]]\nname = "x"\nkind = "image-classification"\n'
            f'train = "rows.npz"\ntest = "rows.npz"\n{key}\n'
        )
        (task,) = BackboneTrainer(tmp_path / "tasks.toml").tasks()
        return task.content_hash

    own = content_hash("")
    assert content_hash('share_with = "everybody"') == own
    assert len({own, content_hash('owner = "acme"'), content_hash('owner = "zoo"')}) == 3


def test_heads_of_an_own_task_are_not_those_of_another_owners_task(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.merged("x", "data", 3, b"own", task_id="lab/x")
    records.merged("x", "more", 5, b"own too", task_id="lab/x")
    records.merged("x", "more", 8, b"theirs", task_id="acme/x")
    known = Records(tmp_path).get("x")
    assert (known.id_for("lab"), [head.version for head in known.heads]) == ("acme/x", [8])
    assert known.head_at(7) is None


def test_planted_bugs_are_caught(joined: Any, work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (owner, acme), (named, lab), (outsider, _) = (joined(name) for name in ("acme", "lab", "zoo"))
    honest = Submission.header

    def forgets(self: Submission, offset: int = 0) -> hub_pb2.SubmitHeader:
        header = honest(self, offset)
        header.ClearField("sharing")
        return header

    with monkeypatch.context() as patch:
        patch.setattr(Submission, "header", forgets)
        work(owner, {"forgotten": {"share_with": (lab,)}})
    assert work(named, {"forgotten": {"owner": acme}}).merged == 0, "an owner who does not say it shares nothing"
    work(owner, {"x": {"share_with": (lab,)}})
    with monkeypatch.context() as patch:
        patch.setattr(OthersTasks, "is_closed", lambda *_: False)
        assert work(outsider, {"x": {"owner": acme}}).refused == 1, "who does not ask before trains in vain"
    assert "AccessError" in log(outsider, "refused")[0]["reason"], "and it is the hub that keeps the door"


def test_a_hub_that_is_away_is_asked_again_later(joined: Any, work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (owner, acme), (named, lab) = joined("acme"), joined("lab")
    work(owner, {"x": {"share_with": (lab,)}})
    asked: list[str] = []

    def away_once(link: HubLink, chain: Any, task_id: str, version: int) -> SharedHead | None:
        asked.append(task_id)
        if len(asked) == 1:
            raise UnavailableError("gone")
        return fetch_head(link, chain, task_id, version)

    monkeypatch.setattr(others_tasks, "fetch_head", away_once)
    monkeypatch.setattr(others_tasks, "AGAIN_S", 0.01)
    assert work(named, {"x": {"owner": acme}}).merged == 1
    assert asked == [f"{acme}/x"] * 2
    assert [line["reason"] for line in log(named, "closed")] == ["gone"]


def test_two_organisations_train_one_task_of_their_tasks_files(own_hub_class: Any, tmp_path: Path) -> None:
    backbone = load_backbone("digits-vit", "cpu")
    hub = own_hub_class(tmp_path / "server", describe_space("digits", backbone.site_weights(), k_max=16))
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "rows.npz", x=draw.random((12, 8, 8), dtype=np.float32), y=np.arange(12) % 2)
    hub.start()
    done: dict[str, SessionCounters] = {}
    try:
        for organisation, key in (
            ("acme", 'share_with = ["lab"]'),
            ("lab", 'owner = "acme"'),
            ("zoo", 'owner = "acme"'),
        ):
            layout = hub.client(tmp_path / organisation, f"{organisation}/main")
            (layout.root / "tasks.toml").write_text(
                'backbone = "digits-vit"\ndevice = "cpu"\n[[task]]\nname = "digits"\nkind = "image-classification"\n'
                f'train = "../rows.npz"\ntest = "../rows.npz"\nepochs = 1\n{key}\n'
            )
            done[organisation] = run_session(layout.root, layout.root / "tasks.toml", options=OPTIONS)
        with hub.hub(hub.enrol("acme/looking")) as stub:
            (task,) = stub.ListTasks(hub_pb2.ListTasksRequest()).tasks
            updates = stub.ListUpdates(hub_pb2.ListUpdatesRequest()).updates
    finally:
        hub.stop()
    assert {name: one.merged for name, one in done.items()} == {"acme": 1, "lab": 1, "zoo": 0}
    assert (task.task_id, task.owner, task.updates) == ("acme/digits", "acme/main", 2)
    assert {one.schema_sha256 for one in updates} == {schema_digest("image-classification", (0, 1))}
    assert len(log(ClientLayout(tmp_path / "zoo"), "closed")) == 1
