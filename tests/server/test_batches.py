"""Several updates in one version, shared tasks, staleness, retention: against a real engine on a real store."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from share_core.errors import AccessError, RebaseError, RequestError
from share_core.space import task_adapter
from share_core.types import Adapter, Factors, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2
from share_server.config import MergeConfig, RetentionConfig, ServerConfig
from share_server.hub import collecting, history
from share_server.hub.engine import Engine
from share_server.local import member_of_no_hub, sign_header
from share_server.store.journal import Journal
from share_server.store.records import UpdateRow, VersionRow
from share_server.store.updates import find_update, list_updates
from share_server.store.versions import list_versions, read_version

SCHEMA = "cd" * 32


async def _submit(engine: Engine, organisation: str, task_id: str, payload: bytes, **fields: Any) -> UpdateRow:
    header = hub_pb2.SubmitHeader(
        update_id=secrets.token_hex(16),
        space_id=engine.feed.space_id,
        task_id=task_id,
        create=True,
        payload_size=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        **fields,
    )

    sender = member_of_no_hub(f"{organisation}/one")

    async def messages() -> AsyncIterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=sign_header(header, sender))
        yield hub_pb2.SubmitRequest(chunk=payload)

    return (await engine.intake.receive(sender.caller, messages()))[0]


async def _settle(engine: Engine) -> None:
    """Run the merge loop until nothing waits."""
    running = asyncio.create_task(engine.loop.run())
    while (await engine.store.do(lambda journal: list_updates(journal, 0, 1000)))[-1].state.value == "ACCEPTED":
        engine.loop.wake()
        await asyncio.sleep(0.01)
    engine.loop.stop()
    await running


async def _states(engine: Engine) -> list[tuple[str, int]]:
    rows = await engine.store.do(lambda journal: list_updates(journal, 0, 1000))
    return [(row.state.value, row.version) for row in rows]


def _adapter(spec: SpaceSpec, seed: int, rank: int = 1) -> dict[str, Factors]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: Factors(torch.randn(site.d_out, rank, generator=draw), torch.randn(site.d_in, rank, generator=draw))
        for name, site in spec.sites.items()
    }


def _payload(adapter: Adapter, base: int = 0) -> bytes:
    return encode_update(Update(base, {site: SiteUpdate(residual=factors) for site, factors in adapter.items()}))


def _dense(adapter: Adapter, site: str) -> torch.Tensor:
    return adapter[site].out.double() @ adapter[site].in_.double().T


def _content(space: Space, task_id: str, site: str) -> torch.Tensor:
    return _dense(task_adapter(space, task_id, torch.float64), site)


def test_sizes_of_earlier_versions_are_read_once_and_only_some_are_kept(
    tmp_path: Path, run_engine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, toy_spec: SpaceSpec
) -> None:
    read: list[int] = []

    def recorded(journal: Journal, version: int) -> VersionRow:
        read.append(version)
        return read_version(journal, version)

    async def work(engine: Engine) -> None:
        for number in range(4):  # of one task, so each in a version of its own
            await _submit(engine, "acme", "acme/t", _payload(_adapter(toy_spec, number)))
        await _settle(engine)
        monkeypatch.setattr(history, "read_version", recorded)
        monkeypatch.setattr(history, "_KEPT_SIZES", 2)
        rows = await engine.store.do(lambda journal: list_versions(journal, 0, 4))
        for version in (1, 2, 1, 3, 1, 2):
            assert await engine.history.sizes(version) == rows[version - 1].sizes
        assert read == [1, 2, 3, 2]

    run_engine(tmp_path / "store", work)


def test_what_waits_together_becomes_one_version(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    async def work(engine: Engine) -> None:
        for number in range(4):
            await _submit(engine, "acme", f"acme/t{number}", _payload(_adapter(toy_spec, number)))
        await _submit(engine, "acme", "acme/t1", _payload(_adapter(toy_spec, 9)))  # t1 again: not in the same version
        await _settle(engine)
        assert await _states(engine) == [("MERGED", 1)] * 4 + [("MERGED", 2)]
        versions = await engine.store.do(lambda journal: list_versions(journal, 0, 2))
        assert [len(row.updates) for row in versions] == [4, 1]
        for number, seed in ((0, 0), (1, 9), (2, 2)):
            expected = _dense(_adapter(toy_spec, seed), "a")
            got = _content(engine.feed.state.space, f"acme/t{number}", "a")
            assert torch.linalg.norm(got - expected) <= 0.06 * torch.linalg.norm(expected)

    run_engine(tmp_path / "store", work)


def test_a_batch_never_outgrows_its_bound(tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec) -> None:
    """Ranks in one version add up to at most 4 k_max; the others wait for the next."""

    async def work(engine: Engine) -> None:
        for number in range(8):
            await _submit(engine, "acme", f"acme/t{number}", _payload(_adapter(toy_spec, number, rank=8)))
        await _settle(engine)
        assert [version for _, version in await _states(engine)] == [1] * 6 + [2] * 2  # 6 x 8 = 4 x 12

    run_engine(tmp_path / "store", work)


@pytest.mark.parametrize("mixing", ["mean", "fedasync", "fedbuff"])
def test_a_shared_task_mixes_what_its_organisations_send(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, mixing: str
) -> None:
    ours, theirs = _adapter(toy_spec, 1), _adapter(toy_spec, 2)
    sharing = hub_pb2.TaskSharing(organisations=["lab"])

    async def work(engine: Engine) -> None:
        await _submit(engine, "acme", "acme/both", _payload(ours), sharing=sharing, schema_sha256=SCHEMA)
        await _settle_again(engine)
        await _submit(engine, "lab", "acme/both", _payload(theirs), schema_sha256=SCHEMA)
        await _settle_again(engine)
        first, second = _dense(ours, "a"), _dense(theirs, "a")
        # Both are based on version 0; at the second merge the newest is 1: (1 + 1) ** -0.5 where age counts alone.
        age = 2**-0.5
        expected = {
            "mean": (first + second) / 2,  # equally old: equal weights
            "fedasync": (1 - 0.5 * age) * first + 0.5 * age * second,
            "fedbuff": first + 0.5 * age * second,  # version 0 did not have the task
        }[mixing]
        got = _content(engine.feed.state.space, "acme/both", "a")
        assert torch.linalg.norm(got - expected) <= 0.06 * torch.linalg.norm(expected)

    run_engine(tmp_path / "store", work, ServerConfig(merge=MergeConfig(mixing=mixing)))


async def _settle_again(engine: Engine) -> None:
    """Settle with a loop of its own; :meth:`MergeLoop.run` ends for good."""
    batch, _ = await engine.loop._next_batch()
    while batch:
        await engine.loop._merge(batch)
        batch, _ = await engine.loop._next_batch()


def test_only_named_organisations_with_the_same_labels_may_contribute(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    payload = _payload(_adapter(toy_spec, 1))
    sharing = hub_pb2.TaskSharing(organisations=["lab"])

    async def work(engine: Engine) -> None:
        with pytest.raises(RequestError, match="label schema"):
            await _submit(engine, "acme", "acme/both", payload, sharing=sharing)
        await _submit(engine, "acme", "acme/both", payload, sharing=sharing, schema_sha256=SCHEMA)
        with pytest.raises(AccessError):
            await _submit(engine, "rival", "acme/both", payload, schema_sha256=SCHEMA)
        with pytest.raises(RequestError, match="same labels"):
            await _submit(engine, "lab", "acme/both", payload, schema_sha256="ef" * 32)
        await _submit(engine, "lab", "acme/both", payload, schema_sha256=SCHEMA)
        await _submit(engine, "acme", "acme/own", payload)
        with pytest.raises(AccessError):
            await _submit(engine, "lab", "acme/own", payload)

    run_engine(tmp_path / "store", work)


def test_a_buffer_waits_until_it_is_full_or_has_waited_long(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    sharing = hub_pb2.TaskSharing(open=True)

    async def work(engine: Engine) -> None:
        await _submit(engine, "acme", "acme/t", _payload(_adapter(toy_spec, 1)), sharing=sharing, schema_sha256=SCHEMA)
        batch, pause = await engine.loop._next_batch()
        assert not batch
        assert pause is not None
        assert 0 < pause <= 3600
        await _submit(engine, "lab", "acme/t", _payload(_adapter(toy_spec, 2)), schema_sha256=SCHEMA)
        batch, _ = await engine.loop._next_batch()
        assert len(batch) == 2

    run_engine(tmp_path / "store", work, ServerConfig(merge=MergeConfig(buffer=2, buffer_wait_s=3600.0)))


def _files(root: Path) -> int:
    return sum(path.is_file() for path in (root / "blobs").rglob("*"))


def test_old_versions_go_and_what_was_said_stays(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, make_payload: Callable[..., bytes]
) -> None:
    """Beyond the horizon: payloads are removed, stale updates are refused with rebase, originals stay readable."""
    config = ServerConfig(retention=RetentionConfig(horizon_versions=4, snapshot_every=2))
    root = tmp_path / "store"

    async def work(engine: Engine) -> None:
        old = None
        for number in range(14):
            space = engine.feed.state.space
            row = await _submit(engine, "acme", f"acme/t{number % 5}", make_payload(number, space))
            if number == 3:
                old = row.new.update_id
                before = await engine.loop._contents.of_update(row)
            await _settle_again(engine)
            await engine.collector.collect_now()
        assert engine.feed.oldest > 4
        assert old is not None
        kept = await engine.store.do(lambda journal: find_update(journal, old))
        assert kept is not None
        assert kept.original_sha256 is not None, "an update in coordinates that are gone is kept in ambient factors"
        after = await engine.loop._contents.of_update(kept)
        assert before.keys() == toy_spec.sites.keys()
        for site in before:
            assert torch.linalg.norm(_dense(after, site) - _dense(before, site)) <= 1e-5 * torch.linalg.norm(
                _dense(before, site)
            )
        with pytest.raises(RebaseError, match="no longer kept"):
            await _submit(engine, "acme", "acme/late", _stale(toy_spec, 3))
        versions = await engine.store.do(lambda journal: list_versions(journal, 0, 14))
        assert [row.collected for row in versions] == [row.version < engine.feed.oldest for row in versions]

    run_engine(root, work, config)
    count = _files(root)

    async def again(engine: Engine) -> None:
        assert engine.feed.version == 14
        assert engine.feed.oldest > 4
        assert await engine.collector.collect_now() == 0

    run_engine(root, again, config)
    assert _files(root) == count


def _stale(spec: SpaceSpec, base: int) -> bytes:
    return _payload(_adapter(spec, 77), base)


def test_what_a_waiting_update_is_based_on_is_not_collected(
    tmp_path: Path, run_engine: Callable[..., None], make_payload: Callable[..., bytes]
) -> None:
    config = ServerConfig(retention=RetentionConfig(horizon_versions=2, snapshot_every=1))

    async def work(engine: Engine) -> None:
        for number in range(4):
            await _submit(engine, "acme", f"acme/t{number}", make_payload(number, engine.feed.state.space))
            await _settle_again(engine)
        waiting = await _submit(engine, "acme", "acme/waits", make_payload(50, engine.feed.state.space))
        honest = engine.loop._next_batch

        async def others() -> tuple[list[UpdateRow], float | None]:
            batch, pause = await honest()
            return [row for row in batch if row.new.update_id != waiting.new.update_id], pause

        engine.loop._next_batch = others  # type: ignore[method-assign]
        for number in range(8):
            await _submit(engine, "acme", f"acme/t{number % 4}", make_payload(10 + number, engine.feed.state.space))
            await _settle_again(engine)
            await engine.collector.collect_now()
        assert engine.feed.version == 12
        assert engine.feed.oldest == waiting.new.base_version
        engine.loop._next_batch = honest  # type: ignore[method-assign]
        await _settle_again(engine)
        found = await engine.store.do(lambda journal: find_update(journal, waiting.new.update_id))
        assert found is not None
        assert found.state.value == "MERGED", found.reason

    run_engine(tmp_path / "store", work, config)


@pytest.mark.parametrize("most", [2, 1000])
def test_a_long_collection_lets_merges_through(
    tmp_path: Path,
    run_engine: Callable[..., None],
    make_payload: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
) -> None:
    """Updates in coordinates that go are written out a few at a time; without the bound, all at once."""
    config = ServerConfig(retention=RetentionConfig(horizon_versions=2, snapshot_every=1))

    async def originals(engine: Engine) -> int:
        rows = await engine.store.do(lambda journal: list_updates(journal, 0, 1000))
        return sum(row.original_sha256 is not None for row in rows)

    async def work(engine: Engine) -> None:
        monkeypatch.setattr(engine.collector, "collect", nothing)
        for number in range(9):
            await _submit(engine, "acme", f"acme/t{number}", make_payload(number, engine.feed.state.space))
            await _settle_again(engine)
        monkeypatch.undo()
        monkeypatch.setattr(collecting, "_PAGE", 1)
        monkeypatch.setattr(collecting, "_MOST_ORIGINALS", most)
        found = []
        while engine.feed.oldest == 0:
            await engine.collector.collect()
            found.append(await originals(engine))
        assert found[-1] > 4
        steps = [later - earlier for earlier, later in pairwise([0, *found])]
        assert max(steps) == min(most, found[-1])
        assert (len(steps) == 1) == (most > found[-1])

    async def nothing() -> int:
        return 0

    run_engine(tmp_path / "store", work, config)
