"""The session loop with a real hub and a trainer of milliseconds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from share_client.egress_check import look
from share_client.link import HubLink
from share_client.member import ClientLayout, load_member, save_member
from share_client.records import Records
from share_client.session import SessionCounters, SessionOptions, run_session
from share_core.errors import ConfigError, SpaceMismatchError, UnavailableError
from share_core.lease import Lease
from share_proto.v1 import hub_pb2

OPTIONS = SessionOptions(linger_s=0.5, poll_s=0.02, lock_s=0.5)


def write_tasks(layout: ClientLayout, **tasks: str) -> Path:
    path = layout.root / "tasks.json"
    path.write_text(json.dumps(tasks))
    return path


def run(layout: ClientLayout, fake: Any, lease: Lease | None = None, **changes: Any) -> SessionCounters:
    path = layout.root / "tasks.json"
    options = replace(OPTIONS, **changes)
    return run_session(layout.root, path, lease, trainer=fake.FakeTrainer(path), options=options)


def reported(link: HubLink, organisation: str) -> dict[str, list[int]]:
    """Return the versions at which the hub holds an evaluation, by task."""
    found: dict[str, list[int]] = {}
    for line in link.hub.ListEvaluations(hub_pb2.ListEvaluationsRequest()).evaluations:
        if line.task_id.startswith(f"{organisation}/"):
            found.setdefault(line.task_id, []).append(line.version)
    return found


def lease_of(layout: ClientLayout, **changes: Any) -> Lease:
    member = load_member(layout)
    made = Lease(
        lease_id="ab" * 16,
        node_id=5,
        space_id=member.space_id,
        hub_address=member.hub_address,
        deadline_unix_ms=int((time.time() + 600) * 1000),
        max_updates=0,
    )
    return replace(made, **changes)


def test_every_task_is_trained_once_and_evaluated_at_every_version(
    own_hub: Any, fake: Any, tmp_path: Path, connect: Callable[..., HubLink]
) -> None:
    clients = [own_hub.client(tmp_path / name, f"{name}/main") for name in ("north", "south")]
    for layout in clients:
        write_tasks(layout, first="data one", second="data two", third="data three")
    with ThreadPoolExecutor(2) as pool:
        counters = list(pool.map(lambda layout: run(layout, fake, linger_s=2.0), clients))
    assert [(c.submitted, c.merged, c.refused, c.idle) for c in counters] == [(3, 3, 0, True)] * 2
    newest = connect(clients[0]).describe().version
    assert 3 <= newest <= 6, "one version may hold an update of each client"
    assert [c.version for c in counters] == [newest] * 2
    for layout in clients:
        organisation = load_member(layout).organisation
        link = connect(layout)
        updated = {task.task_id: task.updated_version for task in link.list_tasks().tasks}
        found = reported(link, organisation)
        assert len(found) == 3
        for task_id, versions in found.items():
            assert versions == list(range(updated[task_id], newest + 1))
        assert len((layout.root / "trained.jsonl").read_text().splitlines()) == 3
        again = run(layout, fake)
        assert (again.submitted, again.evaluated, again.idle) == (0, 0, True)


def test_changed_data_is_trained_again_and_new_tasks_may_come_any_time(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "changes/main")
    write_tasks(layout, first="data one")
    with working(layout, fake) as trained:
        trained(1)
        write_tasks(layout, first="data one", second="data two")
        trained(2)
        write_tasks(layout, first="other data", second="data two")
        trained(3)
        (layout.root / "tasks.json").write_text("{ not json")
        write_tasks(layout, first="other data", second="data two", third="data three")
        trained(4)
    names = [json.loads(line)["task"] for line in (layout.root / "trained.jsonl").read_text().splitlines()]
    assert names == ["first", "second", "first", "third"]


@contextmanager
def working(layout: ClientLayout, fake: Any) -> Iterator[Callable[[int], None]]:
    """Run a session in a thread; give a function that waits for a number of merges."""
    stop = threading.Event()
    path = layout.root / "tasks.json"
    options = replace(OPTIONS, linger_s=60.0)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_session, layout.root, path, trainer=fake.FakeTrainer(path), options=options, stop=stop)

        def merges(count: int) -> None:
            while not future.done():
                text = layout.session_log.read_text() if layout.session_log.exists() else ""
                if text.count('"event": "merged"') >= count:
                    return
                time.sleep(0.02)
            raise AssertionError(f"the session ended early: {future.result()}")

        try:
            yield merges
        finally:
            stop.set()
        assert future.result().idle is False


def test_a_lease_bounds_the_work(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "leases/main")
    write_tasks(layout, one="1", two="2", three="3")
    past = int((time.time() - 1) * 1000)
    assert run(layout, fake, lease_of(layout, deadline_unix_ms=past)).submitted == 0
    first = run(layout, fake, lease_of(layout, max_updates=2))
    assert (first.submitted, first.merged, first.idle) == (2, 2, False)
    rest = run(layout, fake, lease_of(layout))
    assert (rest.submitted, rest.idle) == (1, True)


@pytest.mark.parametrize("bug", ["", "removed before it is recorded"])
def test_a_killed_session_is_continued(
    bug: str, hub: Any, tmp_path: Path, run_script: Callable[..., dict[str, Any]], connect: Callable[..., HubLink]
) -> None:
    organisation = "killed-buggy" if bug else "killed"
    steps = 2 if bug else 6
    layouts = [hub.client(tmp_path / str(n), f"{organisation}-{n}/main") for n in range(steps)]
    for layout in layouts:
        write_tasks(layout, only="the data")
    answers = run_script("session_kills.py", bug, *(str(layout.root) for layout in layouts))
    wrong = []
    for (step, answer), layout in zip(answers.items(), layouts, strict=True):
        at_hub = connect(layout).hub.ListUpdates(hub_pb2.ListUpdatesRequest()).updates
        # Killed before the entry had its name, the training is lost and is done again; never otherwise.
        trainings = 2 if step == "rename entry" else 1
        good = (
            len(at_hub) == 1
            and answer["trainings"] == trainings
            and answer["merged"] == [at_hub[0].update_id]
            and answer["left"] == []
            and at_hub[0].version in answer["evaluated"]
            and look(layout, None, connect(layout)).problems == []
        )
        if not good:
            wrong.append((step, len(at_hub), answer))
    if bug:
        assert [step for step, _, _ in wrong] == ["remove done"], "the planted bug was not caught"
    else:
        assert wrong == []


def test_another_backbone_is_refused_before_training(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "backbone/main")
    path = write_tasks(layout, only="the data")

    class OtherBackbone(fake.FakeTrainer):  # type: ignore[misc]
        def weights(self) -> Any:
            return {name: weight + 1 for name, weight in fake.site_weights().items()}

    with pytest.raises(SpaceMismatchError):
        run_session(layout.root, path, trainer=OtherBackbone(path), options=OPTIONS)
    assert not (layout.root / "trained.jsonl").exists()
    assert '"event": "failed"' in layout.session_log.read_text()


def test_another_space_is_refused(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "space/main")
    write_tasks(layout, only="the data")
    save_member(layout, replace(load_member(layout), space_id="sha256:" + "0" * 64))
    with pytest.raises(SpaceMismatchError, match="enrolled for another backbone"):
        run(layout, fake)


def test_one_session_at_a_time(hub: Any, fake: Any, tmp_path: Path) -> None:
    layout = hub.client(tmp_path / "c", "twice/main")
    write_tasks(layout, only="the data")
    with working(layout, fake) as trained:
        trained(1)
        with pytest.raises(UnavailableError, match="another session works"):
            run(layout, fake)


def test_a_directory_that_is_not_enrolled_says_so(tmp_path: Path, fake: Any) -> None:
    with pytest.raises(ConfigError, match="not enrolled"):
        run_session(tmp_path, tmp_path / "tasks.json", trainer=fake.FakeTrainer(tmp_path / "tasks.json"))


def test_heads_are_kept_only_as_long_as_a_version_needs_them(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for version in (3, 5, 9):
        records.merged("task", f"hash{version}", version, b"head")
    assert [records.get("task").head_at(v).version for v in (3, 4, 5, 8, 9, 99)] == [3, 3, 5, 5, 9, 9]  # type: ignore[union-attr]
    assert records.get("task").head_at(2) is None
    records.prune(6)
    assert [head.version for head in Records(tmp_path).get("task").heads] == [5, 9]
    assert sorted(path.name for path in (tmp_path / "task").glob("head-*")) == [
        "head-00000005.safetensors",
        "head-00000009.safetensors",
    ]
