"""Where a task is known to the hub and not to this client, its training starts from the published head."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from share_client import heads
from share_client.link import HubLink
from share_client.member import ClientLayout
from share_client.session import SessionOptions, run_session
from share_client.trainer import LocalTask, Trained
from share_core.errors import ManifestError, UnavailableError
from share_core.types import SharedHead, Space
from share_proto.v1 import hub_pb2

OPTIONS = SessionOptions(linger_s=0.3, poll_s=0.02, lock_s=0.5)
SCHEMA = "ab" * 32


@pytest.fixture
def work(fake: Any) -> Callable[..., list[SharedHead | None]]:
    """Return a function (directory, data, shares=True): one session; it returns the heads training was given."""

    def run(layout: ClientLayout, data: str, shares: bool = True) -> list[SharedHead | None]:
        given: list[SharedHead | None] = []

        class Sharing(fake.FakeTrainer):  # type: ignore[misc]
            def train(
                self, task: LocalTask, space: Space, task_id: str, progress: Any, shared: SharedHead | None = None
            ) -> Trained:
                given.append(shared)
                trained: Trained = super().train(task, space, task_id, progress, shared)
                if not shares:
                    return trained
                return replace(trained, update=replace(trained.update, head=trained.head), schema_sha256=SCHEMA)

        path = layout.root / "tasks.json"
        path.write_text(json.dumps({"first": data}))
        run_session(layout.root, path, trainer=Sharing(path), options=OPTIONS)
        return given

    return run


@pytest.fixture
def two(hub: Any, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[ClientLayout, ClientLayout]:
    """Two machines of one organisation of the test's own."""
    organisation = "".join(c if c.isalnum() else "-" for c in request.node.name)[-30:].strip("-").lower()
    first, second = (hub.client(tmp_path / name, f"{organisation}/{name}") for name in ("one", "two"))
    return first, second


def events(layout: ClientLayout) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in layout.session_log.read_text().splitlines()]
    return [line for line in lines if line["event"] == "head"]


def test_a_colleague_starts_from_the_shared_head_and_only_the_first_time(
    two: tuple[ClientLayout, ClientLayout], work: Any, connect: Callable[[ClientLayout], HubLink]
) -> None:
    first, second = two
    assert work(first, "data one") == [None], "nobody has trained it before"
    sent = connect(first).hub.ListUpdates(hub_pb2.ListUpdatesRequest()).updates
    assert [(one.schema_sha256, one.bytes.heads) for one in sent] == [(SCHEMA, 4)]
    (shared,) = work(second, "data two")
    assert shared is not None
    assert (shared.schema_sha256, shared.organisations) == (SCHEMA, (shared.task_id.partition("/")[0],))
    written = next(first.tasks.glob("first/head-*.safetensors")).read_bytes()
    assert shared.tensors["seed"].numpy().tobytes() in written, "it is the head of the one that was there first"
    assert "shared in version" in events(second)[0]["reason"]
    assert work(second, "other data") == [None], "it has a head of its own now"


def test_where_none_is_shared_the_head_starts_fresh(two: tuple[ClientLayout, ClientLayout], work: Any) -> None:
    work(two[0], "data one", shares=False)
    assert work(two[1], "data two") == [None]
    assert events(two[1]) == []


@pytest.mark.parametrize("error", [UnavailableError("gone"), ManifestError("forged")])
def test_a_hub_that_gives_none_costs_nothing_and_a_forged_one_ends_the_session(
    error: Exception, two: tuple[ClientLayout, ClientLayout], work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*rest: Any) -> None:
        raise error

    work(two[0], "data one")
    monkeypatch.setattr(heads, "fetch_head", fails)
    if isinstance(error, ManifestError):
        with pytest.raises(ManifestError, match="forged"):
            work(two[1], "data two")
    else:
        assert work(two[1], "data two") == [None]
        assert "starts fresh: gone" in events(two[1])[0]["reason"]


def test_planted_bug_a_session_that_never_asks_is_caught(
    two: tuple[ClientLayout, ClientLayout], work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("share_client.session.first_head", lambda *rest: None)
    work(two[0], "data one")
    with pytest.raises(AssertionError):
        assert work(two[1], "data two") != [None]


def test_a_version_without_the_task_is_not_asked_for() -> None:
    nobody: Any = None
    assert heads.first_head(nobody, nobody, Space(3, {}, {"org/other": {}}), "org/first", nobody) is None
