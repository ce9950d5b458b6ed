"""Uploads that break off: what is kept, for whom, for how long, and how another connection goes on."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from share_core.errors import DigestError, FedshareError, OverloadError, StorageError, UnavailableError
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig, RetentionConfig, ServerConfig
from share_server.hub.access import Caller
from share_server.hub.engine import Engine
from share_server.hub.intake import Intake
from share_server.hub.uploads import Uploads
from share_server.local import member_of_no_hub, sign_header
from share_server.store.updates import list_updates

SENDER = member_of_no_hub("acme/alice")
ALICE = SENDER.caller
EVE = member_of_no_hub("rival/eve").caller
CHUNK = 100


def _header(engine: Engine, payload: bytes, update_id: str, offset: int = 0) -> hub_pb2.SubmitHeader:
    header = hub_pb2.SubmitHeader(
        update_id=update_id,
        space_id=engine.feed.space_id,
        task_id="acme/task",
        create=True,
        payload_size=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        offset=offset,
    )
    return sign_header(header, SENDER)


async def _send(engine: Engine, payload: bytes, update_id: str, offset: int = 0, upto: int | None = None) -> None:
    """Send the payload from ``offset``; with ``upto`` the connection breaks there, once the hub has taken so much."""
    taken = asyncio.Event()

    async def messages() -> AsyncIterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=_header(engine, payload, update_id, offset))
        for start in range(offset, len(payload) if upto is None else upto, CHUNK):
            yield hub_pb2.SubmitRequest(chunk=payload[start : min(start + CHUNK, upto or len(payload))])
        if upto is not None:
            taken.set()
            await asyncio.sleep(3600)

    call = asyncio.create_task(engine.intake.receive(ALICE, messages()))
    if upto is None:
        await call
        return
    asked = asyncio.create_task(taken.wait())
    await asyncio.wait({call, asked}, return_when=asyncio.FIRST_COMPLETED)
    call.cancel()
    asked.cancel()
    (ended,) = await asyncio.gather(call, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError), ended


def test_a_broken_upload_goes_on_where_it_was(
    tmp_path: Path, run_engine: Callable[..., None], make_payload: Callable[..., bytes]
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

    run_engine(tmp_path / "store", first)
    run_engine(tmp_path / "store", second)
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_bytes_that_changed_while_they_waited_are_noticed_and_thrown_away(
    tmp_path: Path, run_engine: Callable[..., None], make_payload: Callable[..., bytes]
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

    run_engine(tmp_path / "store", work)


def test_the_newest_connection_wins_and_one_that_commits_is_waited_for(
    tmp_path: Path, run_engine: Callable[..., None], make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload, name = make_payload(1), secrets.token_hex(16)
    committing, again = asyncio.Event(), asyncio.Event()
    make_durable, settled = Intake._make_durable, Uploads.settled

    async def slow(self: Intake, *arguments: object) -> object:
        committing.set()
        await again.wait()
        return await make_durable(self, *arguments)  # type: ignore[arg-type]

    async def noted(self: Uploads, caller: Caller, update_id: str) -> None:
        if committing.is_set():
            again.set()
        await settled(self, caller, update_id)

    async def work(engine: Engine) -> None:
        monkeypatch.setattr(Intake, "_make_durable", slow)
        monkeypatch.setattr(Uploads, "settled", noted)
        whole = asyncio.create_task(_send(engine, payload, name))
        await committing.wait()
        await _send(engine, payload, name)  # the same once more, while the first is being committed
        await whole
        rows = await engine.store.do(lambda journal: list_updates(journal, 0, 10))
        assert [row.new.update_id for row in rows] == [name]
        other = secrets.token_hex(16)
        begun, go_on = asyncio.Event(), asyncio.Event()
        stuck = asyncio.create_task(_stuck(engine, payload, other, begun, go_on))
        await begun.wait()
        await _send(engine, payload, other)
        go_on.set()
        with pytest.raises(UnavailableError):
            await stuck
        assert len(await engine.store.do(lambda journal: list_updates(journal, 0, 10))) == 2

    run_engine(tmp_path / "store", work)


async def _stuck(engine: Engine, payload: bytes, name: str, begun: asyncio.Event, go_on: asyncio.Event) -> None:
    """An upload whose connection the client has given up, but not the hub; after ``go_on`` its rest comes too late."""

    async def messages() -> AsyncIterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=_header(engine, payload, name))
        yield hub_pb2.SubmitRequest(chunk=payload[:CHUNK])
        begun.set()
        await go_on.wait()
        for start in range(CHUNK, len(payload), CHUNK):
            yield hub_pb2.SubmitRequest(chunk=payload[start : start + CHUNK])

    await engine.intake.receive(ALICE, messages())


def test_nothing_is_acknowledged_once_another_thread_has_met_a_failure(
    tmp_path: Path, run_engine: Callable[..., None], make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
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

    run_engine(tmp_path / "store", work)


def test_what_is_left_unfinished_is_bounded_and_the_oldest_goes_first(
    tmp_path: Path, run_engine: Callable[..., None], make_payload: Callable[..., bytes]
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

    run_engine(tmp_path / "store", work, config)


def test_unfinished_uploads_end_with_their_time(
    tmp_path: Path, run_engine: Callable[..., None], make_payload: Callable[..., bytes]
) -> None:
    payload, name = make_payload(1), secrets.token_hex(16)

    async def first(engine: Engine) -> None:
        await _send(engine, payload, name, upto=400)

    async def second(engine: Engine) -> None:
        assert await engine.intake.progress(ALICE, name) == (0, None)

    run_engine(tmp_path / "store", first)
    (kept,) = (tmp_path / "store" / "staging").iterdir()
    os.utime(kept, (1, 1))
    run_engine(tmp_path / "store", second)


@pytest.mark.parametrize(
    ("limits", "words", "admitted"),
    [
        (LimitConfig(free_space_bytes=2**60), "disk is nearly full", 0),
        (LimitConfig(member_calls_per_s=0.001), "uploads per second", 1),
        (LimitConfig(concurrent_uploads=4), "its share", 1),
    ],
    ids=["disk", "calls", "slots"],
)
def test_too_much_is_refused_before_the_payload_with_a_hint(
    tmp_path: Path,
    run_engine: Callable[..., None],
    make_payload: Callable[..., bytes],
    limits: LimitConfig,
    words: str,
    admitted: int,
) -> None:
    payload = make_payload(1)

    async def work(engine: Engine) -> None:
        told: list[str] = []
        refused: list[FedshareError] = []
        all_answered = asyncio.Event()

        def look() -> None:
            if len(told) + len(refused) == 3:
                all_answered.set()

        async def go_ahead() -> None:
            told.append("go ahead")
            look()

        async def messages() -> AsyncIterator[hub_pb2.SubmitRequest]:
            yield hub_pb2.SubmitRequest(header=_header(engine, payload, secrets.token_hex(16)))
            await all_answered.wait()
            yield hub_pb2.SubmitRequest(chunk=payload)

        async def submit() -> None:
            try:
                await engine.intake.receive(ALICE, messages(), go_ahead)
            except FedshareError as error:
                refused.append(error)
                look()

        await asyncio.gather(*(submit() for _ in range(3)))
        assert (len(told), len(refused)) == (admitted, 3 - admitted)
        for error in refused:
            assert isinstance(error, OverloadError)
            assert words in str(error)
            assert error.retry_after_ms > 0

    run_engine(tmp_path / "store", work, ServerConfig(limits=limits))
