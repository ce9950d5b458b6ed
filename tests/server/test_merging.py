"""The merge loop: payload durable, then version row durable, then published; never the other way round."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from share_core.errors import StorageError
from share_core.merge import HubState
from share_core.types import SpaceSpec
from share_server.config import MergeConfig, RetentionConfig
from share_server.hub import merging
from share_server.hub.collecting import Collector
from share_server.hub.contents import Contents
from share_server.hub.feed import Feed
from share_server.hub.history import History
from share_server.hub.merging import MergeLoop
from share_server.hub.metrics import Metrics
from share_server.hub.policy import policy_of
from share_server.hub.stepping import Step, Stepper
from share_server.store.blobs import BlobStore
from share_server.store.records import UpdateRow
from share_server.store.store import Store
from share_server.store.versions import commit_version, head_version


def _loop(store: Store, spec: SpaceSpec, feed: Feed, signing_key: bytes) -> MergeLoop:
    contents = Contents(store, spec, History(store, spec, feed))
    retention = RetentionConfig()
    return MergeLoop(
        store,
        feed,
        contents,
        Stepper(contents, spec),
        Collector(store, feed, contents, retention),
        policy_of(spec, MergeConfig()),
        MergeConfig(),
        retention,
        signing_key,
        Metrics(),
    )


Accept = Callable[..., Awaitable[None]]


def _order(
    root: Path,
    spec: SpaceSpec,
    key: bytes,
    begin: Callable[[Store], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
    mutant: str = "",
) -> list[str]:
    """Merge one update with every step recorded; ``mutant`` plants a bug."""
    events: list[str] = []
    put = BlobStore.put

    def recorded_put(self: BlobStore, data: bytes) -> str:
        digest = put(self, data)
        events.append("payload")
        return digest

    def recorded_commit(*arguments: object) -> None:
        commit_version(*arguments)  # type: ignore[arg-type]
        events.append("row")

    class Recorded(Feed):
        def publish(self, state: HubState) -> None:
            events.append("publish")
            super().publish(state)

    async def run() -> None:
        store, state = await Store.open(root, spec)
        await begin(store)
        monkeypatch.setattr(BlobStore, "put", recorded_put)
        monkeypatch.setattr(merging, "commit_version", recorded_commit)
        feed = Recorded(state, spec.space_id)
        loop = _loop(store, spec, feed, key)
        if mutant == "publish first":
            honest = loop._commit

            async def hasty(step: Step, batch: Sequence[UpdateRow]) -> None:
                feed.publish(step.state)
                await honest(step, batch)

            monkeypatch.setattr(loop, "_commit", hasty)
        running = asyncio.create_task(loop.run())
        while feed.version == 0 or events[-1:] != ["publish"]:
            await asyncio.sleep(0.01)
        loop.stop()
        await running
        await store.close()

    asyncio.run(run())
    return events


def test_a_version_is_durable_before_it_is_published(
    tmp_path: Path,
    toy_spec: SpaceSpec,
    signing_key: bytes,
    accept: Accept,
    make_payload: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = _order(
        tmp_path / "store", toy_spec, signing_key, lambda store: accept(store, make_payload(1)), monkeypatch
    )
    assert events == ["payload", "row", "publish"]


def test_publishing_first_would_be_noticed(
    tmp_path: Path,
    toy_spec: SpaceSpec,
    signing_key: bytes,
    accept: Accept,
    make_payload: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = _order(
        tmp_path / "store",
        toy_spec,
        signing_key,
        lambda store: accept(store, make_payload(1)),
        monkeypatch,
        "publish first",
    )
    assert events[0] == "publish"


def test_nobody_sees_a_version_that_could_not_be_committed(
    tmp_path: Path,
    toy_spec: SpaceSpec,
    signing_key: bytes,
    accept: Accept,
    make_payload: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("the disk refused")

    async def run() -> None:
        store, state = await Store.open(tmp_path / "store", toy_spec)
        await accept(store, make_payload(1))
        monkeypatch.setattr(merging, "commit_version", refuse)
        feed = Feed(state, toy_spec.space_id)
        with pytest.raises(StorageError, match="the disk refused"):
            await _loop(store, toy_spec, feed, signing_key).run()
        assert feed.version == 0
        assert store.failed.is_set()
        await store.close()
        shutil.copytree(tmp_path / "store", tmp_path / "later")  # what the next process would find
        store, state = await Store.open(tmp_path / "later", toy_spec)
        assert (state.space.version, await store.do(head_version)) == (0, 0)
        monkeypatch.undo()
        feed = Feed(state, toy_spec.space_id)
        loop = _loop(store, toy_spec, feed, signing_key)
        running = asyncio.create_task(loop.run())
        while feed.version == 0:
            await asyncio.sleep(0.01)
        loop.stop()
        await running
        await store.close()

    asyncio.run(run())
