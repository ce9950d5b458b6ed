"""Shared heads: the weighted mean of what the contributors send, for those who may have it, and no private one."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from share_core.errors import (
    AccessError,
    PayloadTooLargeError,
    RebaseError,
    SpaceMismatchError,
    UnknownTaskError,
    VersionError,
)
from share_core.identity import Manifest, SignedManifest
from share_core.identity.manifest import parse_manifest
from share_core.types import Factors, SharedHead, SiteUpdate, SpaceSpec, Update
from share_core.wire import MAX_HEAD_BYTES, decode_head, encode_update
from share_proto.v1 import hub_pb2
from share_server.config import MergeConfig, RobustConfig, ServerConfig, config_to_toml
from share_server.hub import heads, intake, merging
from share_server.hub.contents import Contents
from share_server.hub.engine import Engine
from share_server.hub.streams import Streams
from share_server.layout import Layout
from share_server.local import member_of_no_hub, sign_header
from share_server.operations.forget import forget
from share_server.operations.rebuild import rebuild
from share_server.provision import create_server
from share_server.store.updates import list_updates
from share_server.store.versions import read_manifest

SCHEMA = "cd" * 32
WITH_LAB = hub_pb2.TaskSharing(organisations=["lab", "mill"])
BOTH = "acme/both"


def head(seed: int, classes: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(classes, 5, generator=draw), "bias": torch.randn(classes, generator=draw)}


def payload(spec: SpaceSpec, seed: int, tensors: Mapping[str, Tensor], base: int = 0) -> bytes:
    """Return a free update of rank 1 in ``base`` with a head."""
    draw = torch.Generator().manual_seed(seed)
    sites = {
        name: SiteUpdate(
            residual=Factors(torch.randn(site.d_out, 1, generator=draw), torch.randn(site.d_in, 1, generator=draw))
        )
        for name, site in spec.sites.items()
    }
    return encode_update(Update(base, sites, tensors))


async def send(engine: Engine, organisation: str, task_id: str, data: bytes, **fields: Any) -> str:
    """Submit one update and merge what waits; return its state, with the reason if it was refused."""
    sender = member_of_no_hub(f"{organisation}/one")
    header = hub_pb2.SubmitHeader(
        update_id=secrets.token_hex(16),
        space_id=engine.feed.space_id,
        task_id=task_id,
        create=True,
        payload_size=len(data),
        payload_sha256=hashlib.sha256(data).hexdigest(),
        schema_sha256=SCHEMA,
        **fields,
    )

    async def messages() -> AsyncIterator[hub_pb2.SubmitRequest]:
        yield hub_pb2.SubmitRequest(header=sign_header(header, sender))
        yield hub_pb2.SubmitRequest(chunk=data)

    await engine.intake.receive(sender.caller, messages())
    while batch := (await engine.loop._next_batch())[0]:
        await engine.loop._merge(batch)
    row = (await engine.store.do(lambda journal: list_updates(journal, 0, 1000)))[-1]
    return f"{row.state.value} {row.reason}".strip()


async def fetch(
    engine: Engine, task_id: str, organisation: str = "acme", version: int = 0, role: str = "trainer"
) -> SharedHead:
    """Return the head that a member of an organisation is given."""
    caller = member_of_no_hub(f"{organisation}/one", role).caller
    header, data = await engine.heads.of_task(caller, task_id, version)
    assert header.payload_sha256 == hashlib.sha256(data).hexdigest()
    return decode_head(data)


def slow_mean(parts: list[tuple[int, dict[str, Tensor]]], version: int) -> dict[str, Tensor]:
    """Return the mean over (base version, head) of one task last merged in ``version``, number by number."""
    shares = [1 / (1 + (version - 1 - base)) ** 0.5 for base, _ in parts]
    out = {}
    for name, like in parts[0][1].items():
        flat = [
            sum(share * float(one[name].flatten()[i]) for share, (_, one) in zip(shares, parts, strict=True))
            / sum(shares)
            for i in range(like.numel())
        ]
        out[name] = torch.tensor(flat).reshape(like.shape)
    return out


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(
        bool(torch.allclose(found[name], expected[name], atol=1e-6)) for name in expected
    )


async def two_organisations(engine: Engine, spec: SpaceSpec) -> list[tuple[int, dict[str, Tensor]]]:
    """Let two organisations share a task, of different age; return base version and head of both."""
    assert await send(engine, "acme", BOTH, payload(spec, 1, head(1)), sharing=WITH_LAB) == "MERGED"
    assert await send(engine, "acme", "acme/own", payload(spec, 2, {})) == "MERGED"
    assert await send(engine, "mill", "mill/own", payload(spec, 3, head(9))) == "MERGED"
    assert await send(engine, "lab", BOTH, payload(spec, 4, head(2), 3)) == "MERGED"
    assert engine.feed.version == 4
    return [(0, head(1)), (3, head(2))]


@pytest.mark.parametrize("mixing", ["mean", "fedasync", "fedbuff"])
def test_the_head_is_the_weighted_mean_of_what_is_shared(
    mixing: str, tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    async def work(engine: Engine) -> None:
        parts = await two_organisations(engine, toy_spec)
        for organisation in ("acme", "lab", "mill"):
            found = await fetch(engine, BOTH, organisation)
            assert (found.task_id, found.version, found.organisations) == (BOTH, 4, ("acme", "lab"))
            assert (found.left_out, found.schema_sha256) == ((), SCHEMA)
            assert same(found.tensors, slow_mean(parts, 4))
            assert not same(found.tensors, slow_mean([(0, head(1)), (0, head(2))], 4)), "age counts"
        early = await fetch(engine, BOTH, version=2)
        assert early.organisations == ("acme",) and same(early.tensors, head(1))
        # A contributor who sends none any more is left out, and one of no organisation but the owner's has it alone.
        assert await send(engine, "acme", BOTH, payload(toy_spec, 5, {}, 4)) == "MERGED"
        alone = await fetch(engine, BOTH)
        assert alone.organisations == ("lab",) and same(alone.tensors, head(2))

    run_engine(tmp_path / "store", work, ServerConfig(merge=MergeConfig(mixing=mixing)))


def test_declared_rows_weigh_as_they_do_for_cores(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    async def work(engine: Engine) -> None:
        await send(engine, "acme", BOTH, payload(toy_spec, 1, head(1)), sharing=WITH_LAB, rows=10)
        await send(engine, "lab", BOTH, payload(toy_spec, 2, head(2)), rows=90)
        found = (await fetch(engine, BOTH)).tensors  # capped at 30: 1 to 3
        assert same(found, {name: (head(1)[name] + 3 * head(2)[name]) / 4 for name in found})

    run_engine(tmp_path / "store", work, ServerConfig(merge=MergeConfig(rows_cap=30)))


@pytest.mark.parametrize("judged", ["cosine", "off"])
def test_who_is_outvoted_has_no_weight_in_the_head_either(
    judged: str, tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    """The one that says the opposite came first, when nobody could judge it. Without judges it is in the mean."""

    async def work(engine: Engine) -> None:
        honest = ("lab", "mill", "north", "west")
        await send(engine, "acme", BOTH, alike(toy_spec, 1, -1), sharing=hub_pb2.TaskSharing(open=True))
        for number, organisation in enumerate(honest, 2):
            assert await send(engine, organisation, BOTH, alike(toy_spec, number, 1)) == "MERGED"
        found = await fetch(engine, BOTH)
        counted = honest if judged == "cosine" else ("acme", *honest)
        assert (found.organisations, found.left_out) == (counted, ())
        parts = [(0, head(number)) for number, name in enumerate(("acme", *honest), 1) if name in counted]
        assert same(found.tensors, slow_mean(parts, 5))

    run_engine(tmp_path / "store", work, ServerConfig(robust=RobustConfig(filter=judged)))


def alike(spec: SpaceSpec, seed: int, sign: int) -> bytes:
    """Return a free update that says nearly what all others do, or the opposite, with a head of its own."""
    draw, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    sites = {}
    for name, site in spec.sites.items():
        out = torch.randn(site.d_out, 1, generator=draw) + 0.1 * torch.randn(site.d_out, 1, generator=own)
        sites[name] = SiteUpdate(residual=Factors(sign * out, torch.randn(site.d_in, 1, generator=draw)))
    return encode_update(Update(0, sites, head(seed)))


def test_a_private_task_gives_the_newest_head_to_its_organisation_only(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    async def work(engine: Engine) -> None:
        await send(engine, "acme", "acme/own", payload(toy_spec, 1, head(1)))
        await send(engine, "acme", "acme/own", payload(toy_spec, 2, head(2, classes=4), 1))
        found = await fetch(engine, "acme/own", role="reader")
        assert found.organisations == ("acme",) and same(found.tensors, head(2, classes=4))
        with pytest.raises(AccessError, match="ask acme to share the task"):
            await fetch(engine, "acme/own", "lab")

    run_engine(tmp_path / "store", work)


def test_an_outsider_a_wrong_task_and_a_wrong_version_are_refused(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    async def work(engine: Engine) -> None:
        await two_organisations(engine, toy_spec)
        with pytest.raises(AccessError, match="members of rival may not"):
            await fetch(engine, BOTH, "rival")
        server = member_of_no_hub("server/operator", "operator").caller
        assert decode_head((await engine.heads.of_task(server, BOTH, 0))[1]).organisations == ("acme", "lab")
        with pytest.raises(UnknownTaskError, match="holds no task 'acme/none'"):
            await fetch(engine, "acme/none")
        with pytest.raises(UnknownTaskError):
            await fetch(engine, "mill/own", "mill", version=2)  # it came with version 3
        for version in (5, -1):
            with pytest.raises(VersionError):
                await fetch(engine, BOTH, version=version)
        engine.feed.oldest = 3
        with pytest.raises(RebaseError, match="no longer kept"):
            await fetch(engine, BOTH, version=2)

    run_engine(tmp_path / "store", work)


def test_planted_bug_everybody_may_have_every_head_is_caught(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_may_have", lambda *rest: True)

    async def work(engine: Engine) -> None:
        await two_organisations(engine, toy_spec)
        with pytest.raises(pytest.fail.Exception), pytest.raises(AccessError):
            await fetch(engine, BOTH, "rival")

    run_engine(tmp_path / "store", work)


def test_a_head_that_is_not_sent_is_not_there(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    async def work(engine: Engine) -> None:
        await send(engine, "acme", "acme/own", payload(toy_spec, 1, {}))
        found = await fetch(engine, "acme/own")
        assert (found.organisations, found.tensors, found.schema_sha256) == ((), {}, "")

    run_engine(tmp_path / "store", work)


def test_the_odd_head_is_refused_and_the_mean_stays(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: Engine) -> None:
        parts = await two_organisations(engine, toy_spec)
        for odd, tensor in ((head(3, classes=4), "bias"), ({"score": head(3)["bias"]}, "bias")):
            said = await send(engine, "mill", BOTH, payload(toy_spec, 6, odd))
            assert said.startswith("REFUSED TensorShapeError") and f"tensor '{tensor}'" in said
            assert "share_head = false" in said
        assert engine.feed.version == 4
        assert same((await fetch(engine, BOTH)).tensors, slow_mean(parts, 4))
        # Planted bug: nobody looks. The newest then stays, and those that differ from it are told to be left out.
        with monkeypatch.context() as patch:
            patch.setattr(merging, "misfit", _fits)
            assert await send(engine, "mill", BOTH, payload(toy_spec, 7, head(3, classes=4))) == "MERGED"
        found = await fetch(engine, BOTH)
        assert (found.organisations, found.left_out) == (("mill",), ("acme", "lab"))
        # Who is alone with a head may change its form, here after the others send none.
        await send(engine, "acme", BOTH, payload(toy_spec, 8, {}, 5))
        await send(engine, "lab", BOTH, payload(toy_spec, 9, {}, 5))
        assert await send(engine, "mill", BOTH, payload(toy_spec, 10, head(3, classes=2), 5)) == "MERGED"

    run_engine(tmp_path / "store", work)


async def _fits(*rest: Any) -> None:
    return None


def test_of_two_that_wait_together_the_second_is_the_odd_one(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: Engine) -> None:
        await send(engine, "acme", BOTH, payload(toy_spec, 1, {}), sharing=WITH_LAB)
        with monkeypatch.context() as patch:
            patch.setattr(engine.loop, "_next_batch", _nothing)
            await send(engine, "lab", BOTH, payload(toy_spec, 2, head(2)))
            await send(engine, "mill", BOTH, payload(toy_spec, 3, head(3, classes=4)))
        await send(engine, "acme", "acme/own", payload(toy_spec, 4, {}))
        rows = await engine.store.do(lambda journal: list_updates(journal, 0, 10))
        assert [row.state.value for row in rows] == ["MERGED", "MERGED", "REFUSED", "MERGED"]
        assert (await fetch(engine, BOTH)).organisations == ("lab",)

    run_engine(tmp_path / "store", work)


async def _nothing() -> tuple[list[Any], None]:
    return [], None


def test_a_head_that_is_too_large_is_refused_before_it_is_durable(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_HEAD_BYTES == 16 * 2**20
    monkeypatch.setattr(intake, "MAX_HEAD_BYTES", 72)  # of these the head has (3 x 5 + 3) x 4

    async def work(engine: Engine) -> None:
        await send(engine, "acme", "acme/own", payload(toy_spec, 1, head(1)))
        with pytest.raises(PayloadTooLargeError, match="96 bytes, at most 72"):
            await send(engine, "acme", "acme/own", payload(toy_spec, 2, head(1, classes=4)))

    run_engine(tmp_path / "store", work)


def test_it_is_signed_counted_apart_and_of_this_space(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec
) -> None:
    sent: list[tuple[str, str, int]] = []

    async def work(engine: Engine) -> None:
        await two_organisations(engine, toy_spec)
        config = ServerConfig()
        streams = Streams(engine.published, config.limits, lambda caller: None, lambda *one: sent.append(one))
        caller = member_of_no_hub("lab/one").caller
        request = hub_pb2.FetchHeadRequest(space_id=toy_spec.space_id, task_id=BOTH)
        reading = streams.fetch_head(caller, request, engine.heads.of_task)
        messages = [await anext(reading)]
        while sum(len(one.chunk) for one in messages) < messages[0].header.payload_size:
            messages.append(await anext(reading))
        await reading.aclose()  # as a reader does that has all bytes: nothing behind the last one runs
        header, data = messages[0].header, b"".join(one.chunk for one in messages[1:])
        own = await engine.store.do(lambda journal: read_manifest(journal, 4))
        assert own is not None
        signed = parse_manifest(SignedManifest(header.manifest.body, header.manifest.signature).body)
        digest = hashlib.sha256(data).hexdigest()
        expected = Manifest("head", toy_spec.space_id, 4, own.sha256, digest, len(data), signed.issued_ms)
        assert (signed, header.payload_size) == (expected, len(data))
        assert sent == [("lab/one", "head", len(data))]
        with pytest.raises(SpaceMismatchError):
            request.space_id = "sha256:" + "0" * 64
            await anext(streams.fetch_head(caller, request, engine.heads.of_task))

    run_engine(tmp_path / "store", work)


@pytest.fixture
def server(tmp_path: Path, toy_spec: SpaceSpec) -> Callable[..., Any]:
    """Return a function that runs work with an engine on one server directory, under a configuration."""
    layout = Layout(tmp_path / "server")
    create_server(layout, ServerConfig(), toy_spec, datetime.now(UTC))

    def run(work: Callable[[Engine], Awaitable[Any]], spec: SpaceSpec = toy_spec) -> Layout:
        async def opened() -> None:
            engine = await Engine.open(layout.store, spec, ServerConfig(), layout.signing_key.read_bytes())
            try:
                await work(engine)
            finally:
                await engine.close()

        torch.set_num_threads(1)
        asyncio.run(opened())
        return layout

    return run


def test_what_is_forgotten_is_in_no_head_any_more(server: Callable[..., Any], toy_spec: SpaceSpec) -> None:
    async def live(engine: Engine) -> None:
        await two_organisations(engine, toy_spec)
        assert (await fetch(engine, BOTH)).organisations == ("acme", "lab")

    layout = server(live)
    forget(layout, "lab")

    async def look(engine: Engine) -> None:
        found = await fetch(engine, BOTH)
        assert (found.version, found.organisations) == (5, ("acme",))
        assert same(found.tensors, head(1))

    server(look)
    forget(layout, "acme")

    async def gone(engine: Engine) -> None:
        with pytest.raises(UnknownTaskError):
            await fetch(engine, BOTH)

    server(gone)


def test_a_rebuild_weighs_heads_as_it_weighs_cores(server: Callable[..., Any], toy_spec: SpaceSpec) -> None:
    """Under the operator's new rule both are mixed anew; forgetting somebody else leaves them as they are."""

    async def live(engine: Engine) -> None:
        await two_organisations(engine, toy_spec)

    layout = server(live)
    constant = replace(ServerConfig(), merge=MergeConfig(staleness="constant"))
    before = layout.config.read_text()
    layout.config.write_text(config_to_toml(constant))
    assert rebuild(layout, 16).version == 5
    wider = replace(toy_spec, k_max=16)

    async def look(engine: Engine) -> None:
        plain = {name: (head(1)[name] + head(2)[name]) / 2 for name in head(1)}
        assert same((await fetch(engine, BOTH)).tensors, plain)
        assert same((await fetch(engine, BOTH, version=4)).tensors, slow_mean([(0, head(1)), (3, head(2))], 4))

    server(look, wider)
    layout.config.write_text(before)
    forget(layout, "mill")

    async def still(engine: Engine) -> None:
        plain = {name: (head(1)[name] + head(2)[name]) / 2 for name in head(1)}
        found = await fetch(engine, BOTH)
        assert found.version == 6 and same(found.tensors, plain)

    server(still, wider)


def test_nothing_is_kept_so_a_start_gives_the_same_bytes(server: Callable[..., Any], toy_spec: SpaceSpec) -> None:
    seen: list[bytes] = []

    async def look(engine: Engine) -> None:
        if not engine.feed.version:
            await two_organisations(engine, toy_spec)
        for _ in range(2):
            seen.append((await engine.heads.of_task(member_of_no_hub("acme/one").caller, BOTH, 0))[1])

    for _ in range(2):
        server(look)
    assert len(set(seen)) == 1 and len(seen) == 4


def test_planted_bug_equal_weights_is_caught(
    tmp_path: Path, run_engine: Callable[..., None], toy_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def equal(self: Contents, task: Any, rows: Any, version: int) -> list[tuple[Any, float]]:
        return [(row, 1.0) for row in rows]

    monkeypatch.setattr(Contents, "weights_of", equal)

    async def work(engine: Engine) -> None:
        parts = await two_organisations(engine, toy_spec)
        assert not same((await fetch(engine, BOTH)).tensors, slow_mean(parts, 4))

    run_engine(tmp_path / "store", work)
