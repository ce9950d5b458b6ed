"""Which version is the newest: the hub says it, signed and dated, first and again while nothing else happens."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from share_core.identity import Identity, Manifest, SignedManifest, parse_manifest
from share_core.identity.manifest import FRESH_MS, check_newest
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig
from share_server.hub import published as published_module
from share_server.hub import streams as streams_module
from share_server.hub.access import Caller
from share_server.hub.engine import Engine
from share_server.hub.streams import Source, Streams
from share_server.store.versions import read_manifest

READER = Caller(Identity("reader", "acme", "alice"), b"")


def _said(message: hub_pb2.Manifest) -> Manifest:
    return parse_manifest(SignedManifest(message.body, message.signature).body)


def test_the_hub_states_its_newest_version(
    tmp_path: Path,
    run_engine: Callable[..., None],
    accept: Callable[..., Awaitable[None]],
    make_payload: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(engine: Engine) -> None:
        version, first = await engine.published.newest()
        said = _said(first)
        assert (version, said.kind, said.version, said.previous) == (0, "newest", 0, "")
        check_newest(said, engine.feed.space_id, int(datetime.now(UTC).timestamp() * 1000))
        together = await asyncio.gather(*(engine.published.newest() for _ in range(50)))
        assert all(one == (0, first) for one in together), "one signature is for everybody"
        await accept(engine.store, make_payload(1))
        merging = asyncio.create_task(engine.loop.run())
        await engine.feed.wait_after(0, 60)
        version, later = await engine.published.newest()
        own = await engine.store.do(lambda journal: read_manifest(journal, 1))
        assert own is not None
        assert (version, _said(later).version, _said(later).previous) == (1, 1, own.sha256)
        monkeypatch.setattr(published_module, "_SAID_S", -1.0)
        await asyncio.sleep(0.002)
        _, again = await engine.published.newest()
        assert _said(again).issued_ms > _said(later).issued_ms
        engine.loop.stop()
        await merging

    run_engine(tmp_path / "store", work)


class Quiet:
    """A source at version 2 that publishes nothing; its statements are of the versions given."""

    subscribers, space_id, version, closing = 0, "sha256:s", 2, False

    def __init__(self, *versions: int) -> None:
        self._said = itertools.chain(enumerate(versions), itertools.repeat((99, versions[-1])))
        self.waited: list[float] = []

    async def newest(self) -> tuple[int, hub_pb2.Manifest]:
        number, version = next(self._said)
        return version, hub_pb2.Manifest(body=f"{number}: {version}".encode())

    async def wait_after(self, version: int, timeout_s: float) -> None:
        self.waited.append(timeout_s)
        self.closing = len(self.waited) == 6


async def _heard(source: Quiet, since: int) -> list[str]:
    streams = Streams(cast(Source, source), LimitConfig(recheck_s=3600), lambda caller: None, lambda *sent: None)
    request = hub_pb2.FollowVersionsRequest(space_id="sha256:s", since_version=since)
    heard = []
    stream = streams.follow(READER, request)
    with pytest.raises(Exception, match="stopping"):
        async for message in stream:
            heard.append(message.heartbeat.body.decode())
    return heard


def _listen(*versions: int, monkeypatch: pytest.MonkeyPatch, every_s: float = 0.0) -> list[str]:
    monkeypatch.setattr(streams_module, "HEARTBEAT_S", every_s)
    return asyncio.run(_heard(Quiet(*versions), 2))


def test_a_stream_begins_with_a_statement_and_repeats_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _listen(2, 2, 2, monkeypatch=monkeypatch) == ["0: 2", "1: 2", "2: 2", "99: 2"]
    assert _listen(2, 2, 2, monkeypatch=monkeypatch, every_s=3600.0) == ["0: 2"]


def test_no_statement_is_older_than_what_its_reader_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay may hold a step before the statement that names it; its readers must not take the hub for gone back."""
    assert _listen(1, 1, 2, monkeypatch=monkeypatch) == ["2: 2", "99: 2"]


def test_a_hub_that_looks_seldom_at_its_callers_speaks_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Quiet(2)
    monkeypatch.setattr(streams_module, "HEARTBEAT_S", 7.0)
    asyncio.run(_heard(source, 2))
    assert set(source.waited) == {7.0}


def test_statements_go_out_far_more_often_than_they_grow_old() -> None:
    assert 10 * (streams_module.HEARTBEAT_S + published_module._SAID_S) < FRESH_MS / 1000
