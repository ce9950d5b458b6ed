"""Uploads that break off: what is kept, for whom, for how long, and how another connection goes on."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from share_core.errors import DigestError, FedshareError, OverloadError, StorageError, UnavailableError
from share_core.identity import Identity, make_authority, make_signer
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig, RetentionConfig, ServerConfig
from share_server.hub.access import Caller
from share_server.hub.engine import Engine
from share_server.hub.intake import Intake
from share_server.store.updates import list_updates

NOW = datetime.now(UTC)
ALICE = Caller(Identity("trainer", "acme", "alice"), b"")
EVE = Caller(Identity("trainer", "rival", "eve"), b"")
CHUNK = 100


def _run(root: Path, spec: SpaceSpec, work: Callable[[Engine], Awaitable[None]], config: ServerConfig) -> None:
    key = make_signer(*make_authority("test", NOW), Identity("signer", "server", "hub"), NOW, 1)[1]

    async def run() -> None:
        engine = await Engine.open(root, spec, config, key)
        try:
            await work(engine)
        finally:
            await engine.close()

    asyncio.run(run())


def _header(engine: Engine, payload: bytes, update_id: str, offset: int = 0) -> hub_pb2.SubmitHeader:
    return hub_pb2.SubmitHeader(
        update_id=update_id,
        space_id=engine.feed.space_id,
        task_id="acme/task",
        create=True,
        payload_size=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        offset=offset,
    )


async def _send(engine: Engine, payload: bytes, update_id: str, offset: int = 0, upto: int | None = None) -> None:
    """Send the payload from ``offset``; with ``upto`` the connection breaks there."""

    async def messages() -> AsyncIterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=_header(engine, payload, update_id, offset))
        for start in range(offset, len(payload) if upto is None else upto, CHUNK):
            yield hub_pb2.SubmitRequest(chunk=payload[start : min(start + CHUNK, upto or len(payload))])
        if upto is not None:
            await asyncio.sleep(3600)

    call = asyncio.create_task(engine.intake.receive(ALICE, messages()))
    if upto is None:
        await call
        return
    for _ in range(50):
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


CONFIG = ServerConfig()


def test_a_broken_upload_goes_on_where_it_was(
    tmp_path: Path, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload, name = make_payload(1), secrets.token_hex(16)
    assert len(payload) > 700

    async def first(engine: Engine) -> None:
        await _send(engine, payload, name, upto=600)
        assert await engine.intake.progress(ALICE, name) == (600, None)
        assert await engine.intake.progress(EVE, name) == (0, None), "of others nobody learns anything"
        with pytest.raises(UnavailableError, match="has 600 bytes"):
            await _send(engine, payload, name, offset=500)

    async def second(engine: Engine) -> None:  # a hub that was started again
        offset, row = await engine.intake.progress(ALICE, name)
        assert (offset, row) == (600, None)
        await _send(engine, payload, name, offset)
        size, row = await engine.intake.progress(ALICE, name)
        assert row is not None
        assert (size, row.new.sha256) == (len(payload), hashlib.sha256(payload).hexdigest())
        assert await engine.store.io(lambda: engine.store.blobs.read(row.new.sha256)) == payload

    _run(tmp_path / "store", toy_spec, first, CONFIG)
    _run(tmp_path / "store", toy_spec, second, CONFIG)
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_bytes_that_changed_while_they_waited_are_noticed_and_thrown_away(
    tmp_path: Path, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload, name = make_payload(1), secrets.token_hex(16)

    async def work(engine: Engine) -> None:
        await _send(engine, payload, name, upto=600)
        (kept,) = (tmp_path / "store" / "staging").iterdir()
        data = bytearray(kept.read_bytes())
        data[300] ^= 1
        kept.write_bytes(bytes(data))
        with pytest.raises(DigestError):
            await _send(engine, payload, name, offset=600)
        assert await engine.intake.progress(ALICE, name) == (0, None)
        await _send(engine, payload, name)
        assert len(await engine.store.do(lambda journal: list_updates(journal, 0, 10))) == 1

    _run(tmp_path / "store", toy_spec, work, CONFIG)


def test_the_newest_connection_wins_and_one_that_commits_is_waited_for(
    tmp_path: Path, toy_spec: SpaceSpec, make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload, name = make_payload(1), secrets.token_hex(16)
    going, honest = asyncio.Event(), Intake._make_durable

    async def slow(self: Intake, *arguments: object) -> object:
        going.set()
        await asyncio.sleep(0.3)
        return await honest(self, *arguments)  # type: ignore[arg-type]

    async def work(engine: Engine) -> None:
        monkeypatch.setattr(Intake, "_make_durable", slow)
        whole = asyncio.create_task(_send(engine, payload, name))
        await going.wait()
        await _send(engine, payload, name)  # the same once more, while the first is being committed
        await whole
        rows = await engine.store.do(lambda journal: list_updates(journal, 0, 10))
        assert [row.new.update_id for row in rows] == [name]
        other = secrets.token_hex(16)
        stuck = asyncio.create_task(_stuck(engine, payload, other))
        await asyncio.sleep(0.1)
        await _send(engine, payload, other)
        with pytest.raises(UnavailableError):
            await stuck
        assert len(await engine.store.do(lambda journal: list_updates(journal, 0, 10))) == 2

    _run(tmp_path / "store", toy_spec, work, CONFIG)


async def _stuck(engine: Engine, payload: bytes, name: str) -> None:
    """An upload whose connection the client has long given up, but not the hub."""

    async def messages() -> AsyncIterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=_header(engine, payload, name))
        for start in range(0, len(payload), 100):
            yield hub_pb2.SubmitRequest(chunk=payload[start : start + 100])
            await asyncio.sleep(0.05)

    await engine.intake.receive(ALICE, messages())


def test_nothing_is_acknowledged_once_another_thread_has_met_a_failure(
    tmp_path: Path, toy_spec: SpaceSpec, make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update itself is durable and will be there; but a hub whose storage has failed must say nothing any more."""
    honest = Intake._make_durable

    async def failing(self: Intake, *arguments: object) -> object:
        answer = await honest(self, *arguments)  # type: ignore[arg-type]

        def fail() -> None:
            raise StorageError("the disk refused")

        with pytest.raises(StorageError):
            await self._store.io(fail)
        return answer

    async def work(engine: Engine) -> None:
        monkeypatch.setattr(Intake, "_make_durable", failing)
        with pytest.raises(StorageError, match="the disk refused"):
            await _send(engine, make_payload(1), secrets.token_hex(16))

    _run(tmp_path / "store", toy_spec, work, CONFIG)


def test_what_is_left_unfinished_is_bounded_and_the_oldest_goes_first(
    tmp_path: Path, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload = make_payload(1)
    bound = len(payload) + 1000
    config = ServerConfig(retention=RetentionConfig(staging_bytes_per_organisation=bound))
    names = [secrets.token_hex(16) for _ in range(4)]

    async def work(engine: Engine) -> None:
        for name in names:
            await _send(engine, payload, name, upto=400)
        kept = [(await engine.intake.progress(ALICE, name))[0] for name in names]
        assert kept == [0, 400, 400, 400]
        assert sum(path.stat().st_size for path in (tmp_path / "store" / "staging").iterdir()) <= bound

    _run(tmp_path / "store", toy_spec, work, config)


def test_unfinished_uploads_end_with_their_time(
    tmp_path: Path, toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    payload, name = make_payload(1), secrets.token_hex(16)

    async def first(engine: Engine) -> None:
        await _send(engine, payload, name, upto=400)

    async def second(engine: Engine) -> None:
        assert await engine.intake.progress(ALICE, name) == (0, None)

    _run(tmp_path / "store", toy_spec, first, CONFIG)
    (kept,) = (tmp_path / "store" / "staging").iterdir()
    os.utime(kept, (1, 1))
    _run(tmp_path / "store", toy_spec, second, CONFIG)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (LimitConfig(free_space_bytes=2**60), "disk is nearly full"),
        (LimitConfig(member_calls_per_s=0.001), "uploads per second"),
        (LimitConfig(concurrent_uploads=4), "its share"),
    ],
    ids=["disk", "calls", "slots"],
)
def test_too_much_is_refused_before_the_payload_with_a_hint(
    tmp_path: Path, toy_spec: SpaceSpec, make_payload: Callable[..., bytes], limits: LimitConfig, words: str
) -> None:
    payload = make_payload(1)

    async def work(engine: Engine) -> None:
        told: list[str] = []

        async def go_ahead() -> None:
            told.append("go ahead")

        async def messages() -> AsyncIterator[hub_pb2.SubmitRequest]:
            yield hub_pb2.SubmitRequest(header=_header(engine, payload, secrets.token_hex(16)))
            await asyncio.sleep(0.2)
            yield hub_pb2.SubmitRequest(chunk=payload)

        calls = [engine.intake.receive(ALICE, messages(), go_ahead) for _ in range(3)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, FedshareError)]
        assert refused
        assert len(told) == 3 - len(refused)
        for error in refused:
            assert isinstance(error, OverloadError)
            assert words in str(error)
            assert error.retry_after_ms > 0

    _run(tmp_path / "store", toy_spec, work, ServerConfig(limits=limits))
