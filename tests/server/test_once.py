"""What many ask for at once is made once, and what is begun is ended in order also when something fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from share_core.errors import StorageError
from share_core.identity import Identity
from share_core.merge import empty_state
from share_core.types import SpaceSpec
from share_proto.v1 import hub_pb2
from share_server.config import LimitConfig, ServerConfig
from share_server.hub import engine as engine_module
from share_server.hub import process, published
from share_server.hub.access import Caller
from share_server.hub.contents import Contents
from share_server.hub.engine import Engine
from share_server.hub.history import History
from share_server.hub.interceptor import Door
from share_server.hub.once import Once
from share_server.hub.options import CHUNK_BYTES
from share_server.hub.policy import policy_of
from share_server.hub.stepping import Stepper, parts_by_rank
from share_server.hub.streams import Source, Streams
from share_server.store.blobs import BlobStore
from share_server.store.store import Store
from share_server.store.updates import list_accepted
from share_server.store.versions import chain_bytes

NOW = datetime.now(UTC)
READERS = 40

Accept = Callable[[Store, bytes], Awaitable[None]]


async def _merge(engine: Engine, accept: Accept, payloads: list[bytes]) -> None:
    """Accept updates of one task and wait until each has made a version."""
    for payload in payloads:
        await accept(engine.store, payload)
    running = asyncio.create_task(engine.loop.run())
    while engine.feed.version < len(payloads):
        await asyncio.sleep(0.01)
    engine.loop.stop()
    await running


def test_work_is_shared_and_outlives_the_caller_that_began_it() -> None:
    async def run() -> None:
        once: Once[str, int] = Once()
        calls: list[str] = []
        gate = asyncio.Event()

        async def work() -> int:
            calls.append("begun")
            await gate.wait()
            return len(calls)

        first = asyncio.create_task(once.run("a", work))
        others = [asyncio.create_task(once.run("a", work)) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        gate.set()
        assert first.cancelled()
        assert await asyncio.gather(*others) == [1] * 5
        await asyncio.sleep(0)
        assert await once.run("a", work) == 2, "nothing is kept"

    asyncio.run(run())


def test_a_failure_is_told_to_all_and_the_next_try_is_a_new_one() -> None:
    async def run() -> None:
        once: Once[str, int] = Once()
        fails = True

        async def work() -> int:
            await asyncio.sleep(0)
            if fails:
                raise StorageError("the disk refused")
            return 1

        told = await asyncio.gather(*(once.run("a", work) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in told] == [StorageError] * 3
        fails = False
        await asyncio.sleep(0)
        assert await once.run("a", work) == 1

    asyncio.run(run())


def test_readers_that_wake_together_cost_one_look_and_share_one_payload(
    tmp_path: Path,
    run_engine: Callable[..., None],
    accept: Accept,
    make_payload: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(engine: Engine) -> None:
        await _merge(engine, accept, [make_payload(1), make_payload(2)])
        reads: list[str] = []
        sums: list[int] = []
        read = BlobStore.read

        def counted_read(self: BlobStore, digest: str) -> bytes:
            reads.append(digest)
            return read(self, digest)

        def counted_bytes(journal: Any, after: int, upto: int) -> int:
            sums.append(after)
            return chain_bytes(journal, after, upto)

        monkeypatch.setattr(BlobStore, "read", counted_read)
        monkeypatch.setattr(published, "chain_bytes", counted_bytes)
        source = engine.published
        assert not any(await asyncio.gather(*(source.whole_is_better(1) for _ in range(READERS))))
        assert sums == [1]
        steps = await asyncio.gather(*(source.step(2) for _ in range(READERS)))
        assert len(reads) == 1 and len({id(payload) for _, payload in steps}) == 1
        for version in (0, 1):  # the newest one, and one that is replayed from its step
            reads.clear()
            wholes = await asyncio.gather(*(source.whole(version) for _ in range(READERS)))
            assert len({id(payload) for _, payload in wholes}) == 1
            assert len(reads) == version
        reads.clear()
        engine.history._spaces.clear()
        spaces = await asyncio.gather(*(engine.history.space(1) for _ in range(READERS)))
        assert len(reads) == 1 and len({id(space) for space in spaces}) == 1

    run_engine(tmp_path / "store", work)


class _Cut(bytes):
    """A payload that notes how much is taken from it at once."""

    taken: list[int]

    def __getitem__(self, where: Any) -> Any:
        part = super().__getitem__(where)
        self.taken.append(len(part))
        return part


def test_a_reader_in_the_middle_of_a_step_holds_no_copy_of_the_rest() -> None:
    payload = _Cut(3 * CHUNK_BYTES + 5)
    payload.taken = []

    class Two:
        """One step, then the end."""

        subscribers, space_id, version, closing = 0, "sha256:s", 1, False

        async def newest(self) -> None:
            return None

        async def wait_after(self, version: int, timeout_s: float) -> None:
            self.closing = True

        async def whole_is_better(self, position: int) -> bool:
            return False

        async def step(self, version: int) -> tuple[hub_pb2.DeltaHeader, bytes]:
            return hub_pb2.DeltaHeader(version=1, payload_size=len(payload)), payload

    async def run() -> int:
        streams = Streams(cast(Source, Two()), LimitConfig(), lambda caller: None, lambda *sent: None)
        caller = Caller(Identity("reader", "acme", "alice"), b"")
        stream = streams.follow(caller, hub_pb2.FollowVersionsRequest(space_id="sha256:s"))
        size = len((await anext(stream)).delta.data)
        for _ in range(3):
            size += len((await anext(stream)).chunk)
        await stream.aclose()
        return size

    assert asyncio.run(run()) == len(payload)
    assert max(payload.taken) <= CHUNK_BYTES


def test_a_step_whose_caller_gives_up_ends_before_its_caller(
    tmp_path: Path,
    toy_spec: SpaceSpec,
    run_engine: Callable[..., None],
    accept: Accept,
    make_payload: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The merge asks the event loop for originals: a caller that went first would leave it waiting for ever."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*rest: object) -> None:
        begun.set()
        go_on.wait(30)

    async def work(engine: Engine) -> None:
        await accept(engine.store, make_payload(1))
        history = History(engine.store, toy_spec, engine.feed)
        stepper = Stepper(Contents(engine.store, toy_spec, history), toy_spec)
        monkeypatch.setattr(stepper, "_compute", slow)
        rows = await engine.store.do(lambda journal: list_accepted(journal, 1))
        policy = policy_of(toy_spec, ServerConfig().merge)
        step = asyncio.create_task(stepper.step(empty_state(toy_spec), rows, policy, 64))
        await asyncio.to_thread(begun.wait, 30)
        step.cancel()
        await asyncio.wait([step], timeout=0.2)
        early = step.done()
        go_on.set()
        await asyncio.gather(step, return_exceptions=True)
        stepper.close()
        assert not early and step.cancelled()

    run_engine(tmp_path / "store", work)


def test_parts_are_cut_by_rank_and_nothing_is_left_out() -> None:
    def adapter(rank: int) -> Any:
        return {"a": SimpleNamespace(rank=rank), "b": SimpleNamespace(rank=1)}

    def ranks(most: int, *given: int) -> list[list[int]]:
        parts = parts_by_rank([(rank, adapter(rank)) for rank in given], most)
        return [[rank for rank, _ in part] for part in parts]

    assert ranks(4) == []
    assert ranks(4, 2, 2, 1) == [[2, 2], [1]]
    assert ranks(4, 9, 1, 3, 4) == [[9], [1, 3], [4]]
    assert parts_by_rank([("head only", {})], 4) == [[("head only", {})]]


def test_a_store_is_given_back_when_the_engine_cannot_be_built(
    tmp_path: Path, toy_spec: SpaceSpec, signing_key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*rest: object) -> int:
        raise ValueError("no signing key")

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "sign_unsigned", refuse)
            with pytest.raises(ValueError, match="no signing key"):
                await Engine.open(tmp_path / "store", toy_spec, ServerConfig(), signing_key)
        engine = await Engine.open(tmp_path / "store", toy_spec, ServerConfig(), signing_key)
        await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("late", ["merge", "storage", ""])
def test_what_fails_while_the_hub_drains_is_no_clean_stop(
    late: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> object:
        stop, stopping, failed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        flushed: list[str] = []

        async def merging() -> None:
            await stopping.wait()
            if late == "merge":
                raise RuntimeError("the last merge failed")
            if late == "storage":
                failed.set()

        async def nothing(*rest: object) -> None:
            return

        async def flush() -> None:
            flushed.append("traffic")

        server = SimpleNamespace(stop=nothing)
        engine = SimpleNamespace(
            store=SimpleNamespace(failed=failed),
            feed=SimpleNamespace(close=lambda: None),
            loop=SimpleNamespace(run=merging, wake=lambda: None, stop=stopping.set),
            close=nothing,
        )
        hub = SimpleNamespace(
            engine=engine,
            traffic=SimpleNamespace(run=asyncio.Event().wait, flush=flush),
            health=SimpleNamespace(enter_graceful_shutdown=nothing),
            servers=(server, server),
            door=Door(lambda method, context: None, 1.0),
        )
        monkeypatch.setattr("share_server.hub.interceptor._LOOK_S", 0.001)
        stop.set()
        never = asyncio.Event()
        others = cast(Any, never.wait()), cast(Any, never.wait())
        broken = await process._run(cast(Any, hub), ServerConfig(), stop, *others)
        assert flushed == ([] if late else ["traffic"])
        return broken

    assert bool(asyncio.run(run())) is bool(late)
    assert ("merge loop failed" in caplog.text) is (late == "merge")


def test_the_most_rank_of_a_merge_follows_from_the_policy_and_is_not_recorded(toy_spec: SpaceSpec) -> None:
    policy = policy_of(toy_spec, ServerConfig().merge)
    assert policy.most_rank == 4 * toy_spec.k_max
    assert "most_rank" not in policy.to_text(), "what is recorded with a version does not change"
