"""The ledger of noise on coefficients: what may declare it, and that the spend is there exactly when the merge is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.json_format import MessageToDict

from share_core.errors import RequestError, StorageError
from share_core.privacy import (
    CoefficientNoise,
    SampleNoise,
    declaration_to_text,
    gaussian_epsilon,
    noisy_cores,
)
from share_core.types import SiteUpdate, Space, Update
from share_core.wire import encode_update
from share_proto.v1 import hub_pb2
from share_server import tables
from share_server.hub.convert import task_record
from share_server.hub.engine import Engine
from share_server.local import member_of_no_hub, sign_header
from share_server.store import versions
from share_server.store.journal import Journal
from share_server.store.privacy import chained_privacy, privacy_problems, read_privacy, record_spend, restore_privacy
from share_server.store.records import UpdateState
from share_server.store.updates import find_update
from share_server.store.versions import head_version, list_tasks

NOISE = CoefficientNoise(noise_multiplier=4.0, clip=1.0, delta=1e-6)
TEXT = declaration_to_text(NOISE)
SENDER = member_of_no_hub("acme/alice")


def noisy_payload(space: Space, seed: int) -> bytes:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    made = noisy_cores({}, space.bases, 1.0, 4.0, 4, normal)
    return encode_update(Update(space.version, {site: SiteUpdate(core=core) for site, core in made.items()}))


async def submit(engine: Engine, payload: bytes, privacy: str = "", task: str = "acme/task") -> str:
    """Submit one update as a client does; return its id."""
    header = hub_pb2.SubmitHeader(
        update_id=secrets.token_hex(16),
        space_id=engine.feed.space_id,
        task_id=task,
        create=True,
        payload_size=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        privacy=privacy,
    )

    async def messages() -> Any:
        yield hub_pb2.SubmitRequest(header=sign_header(header, SENDER))
        yield memoryview(payload)

    await engine.intake.receive(SENDER.caller, messages())
    return header.update_id


@asynccontextmanager
async def merging(engine: Engine) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Run the merge loop; give a function that waits until an update is in a version."""
    running = asyncio.create_task(engine.loop.run())

    async def merged(update: str) -> None:
        engine.loop.wake()
        while not running.done():
            row = await engine.store.do(lambda journal: find_update(journal, update))
            assert row is not None
            assert row.state is not UpdateState.REFUSED, row.reason
            if row.version:
                return
            await asyncio.sleep(0.005)
        await running

    try:
        yield merged
    finally:
        engine.loop.stop()
        await asyncio.gather(running, return_exceptions=True)


Run = Callable[..., None]


@pytest.mark.parametrize("privacy", ["{", TEXT.replace(":", ": "), TEXT.replace("4.0", "1e400"), "x" * 5000])
def test_a_declaration_that_is_not_canonical_is_refused(
    privacy: str, run_engine: Run, tmp_path: Path, make_payload: Callable[..., bytes]
) -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(RequestError, match=r"^privacy: "):
            await submit(engine, make_payload(1), privacy)
        assert await engine.store.do(list_tasks) == []

    run_engine(tmp_path / "store", work)


def refuses_exposed(run_engine: Run, root: Path, make_payload: Callable[..., bytes]) -> None:
    """Submit free directions under a declaration of noise on coefficients."""

    async def work(engine: Engine) -> None:
        with pytest.raises(RequestError, match=r"holds nothing else, got [1-9][0-9]* bytes of free directions"):
            await submit(engine, make_payload(1), TEXT)

    run_engine(root, work)


def test_noise_on_coefficients_carries_no_directions(
    run_engine: Run, tmp_path: Path, make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses_exposed(run_engine, tmp_path / "store", make_payload)
    monkeypatch.setattr("share_server.hub.intake._check_privacy", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        refuses_exposed(run_engine, tmp_path / "other", make_payload)


def test_the_ledger_counts_what_was_published(
    run_engine: Run, tmp_path: Path, make_payload: Callable[..., bytes], toy_spec: Any
) -> None:
    samples = declaration_to_text(SampleNoise(2.0, 1e-5, 1.1, 1.0, 60, 0.05))
    smaller = declaration_to_text(CoefficientNoise(8.0, 3.0, 1e-7))

    async def work(engine: Engine) -> None:
        async with merging(engine) as merged:
            await merged(await submit(engine, make_payload(1), samples))
            assert await engine.store.do(read_privacy) == {}
            for privacy in (TEXT, TEXT, smaller, ""):
                await merged(await submit(engine, noisy_payload(engine.feed.state.space, 2), privacy))
        ledger = (await engine.store.do(read_privacy))["acme/task"]
        assert ledger.events == ((4.0, 2), (8.0, 1))
        assert ledger.epsilon == gaussian_epsilon([(4.0, 2), (8.0, 1)], 1e-7)
        (row,) = await engine.store.do(list_tasks)
        with_epsilon = task_record(row, engine.feed.state.ledger["acme/task"], 0.05, 1, ledger)
        assert (with_epsilon.epsilon, with_epsilon.delta) == (ledger.epsilon, 1e-7)
        without = task_record(row, engine.feed.state.ledger["acme/task"], 0.05, 1)
        assert not {"epsilon", "delta"} & set(MessageToDict(without, always_print_fields_with_no_presence=True))
        assert "epsilon" in str(tables.task_table(hub_pb2.ListTasksResponse(tasks=[with_epsilon])).caption)
        assert "epsilon" not in str(tables.task_table(hub_pb2.ListTasksResponse(tasks=[without])).caption)

    run_engine(tmp_path / "store", work)


def states_after_every_commit(
    run_engine: Run, root: Path, make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    """Merge a noisy update and keep what lies on the disk after every commit: what a kill there would leave."""
    copies: list[Path] = []
    honest = Journal.transaction

    @contextlib.contextmanager
    def watched(journal: Journal) -> Iterator[None]:
        with honest(journal):
            yield
        copies.append(root.with_name(f"killed-{len(copies)}"))
        shutil.copytree(root, copies[-1], ignore=shutil.ignore_patterns("lock"))

    async def work(engine: Engine) -> None:
        async with merging(engine) as merged:
            await merged(await submit(engine, make_payload(1)))
            update = await submit(engine, noisy_payload(engine.feed.state.space, 2), TEXT)
            monkeypatch.setattr(Journal, "transaction", watched)
            await merged(update)
        monkeypatch.setattr(Journal, "transaction", honest)

    run_engine(root, work)
    return copies


def broken_promises(run_engine: Run, roots: list[Path]) -> list[str]:
    """Open what each kill has left; return where spend and merge do not go together."""
    wrong: list[str] = []

    for root in roots:

        async def work(engine: Engine, root: Path = root) -> None:
            version, ledgers = await engine.store.do(lambda journal: (head_version(journal), read_privacy(journal)))
            spent = sum(count for _, count in ledgers["acme/task"].events) if ledgers else 0
            if spent != version - 1:
                wrong.append(f"{root.name}: version {version} with {spent} spends")

        run_engine(root, work)
    return wrong


def test_the_spend_is_there_exactly_when_the_merge_is(
    run_engine: Run, tmp_path: Path, make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = states_after_every_commit(run_engine, tmp_path / "store", make_payload, monkeypatch)
    assert copies
    assert broken_promises(run_engine, copies) == []


def test_a_spend_in_another_transaction_would_be_noticed(
    run_engine: Run, tmp_path: Path, make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest_spend, honest_commit = record_spend, versions.commit_version

    def late(journal: Journal, commit: Any, now_ms: int) -> None:
        honest_commit(journal, commit, now_ms)
        with journal.transaction():
            honest_spend(journal, [one.update_id for one in commit.merged])

    monkeypatch.setattr(versions, "record_spend", lambda *_: None)
    monkeypatch.setattr("share_server.hub.merging.commit_version", late)
    copies = states_after_every_commit(run_engine, tmp_path / "store", make_payload, monkeypatch)
    assert broken_promises(run_engine, copies) == ["killed-0: version 2 with 0 spends"]


def test_a_merge_that_fails_spends_nothing(
    run_engine: Run, tmp_path: Path, make_payload: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"

    async def work(engine: Engine) -> None:
        spent: list[object] = []

        def refuse(journal: Journal, updates: Any) -> None:
            record_spend(journal, updates)
            spent.append(updates)
            raise StorageError("the disk refused")

        async with merging(engine) as merged:
            await merged(await submit(engine, make_payload(1)))
            monkeypatch.setattr(versions, "record_spend", refuse)
            with pytest.raises(StorageError, match="the disk refused"):
                await merged(await submit(engine, noisy_payload(engine.feed.state.space, 2), TEXT))
        assert spent

    run_engine(root, work)
    monkeypatch.undo()
    shutil.copytree(root, tmp_path / "later", ignore=shutil.ignore_patterns("lock"))  # what the next process finds
    assert broken_promises(run_engine, [tmp_path / "later"]) == []


def test_what_the_chain_says_is_the_authority(
    run_engine: Run, tmp_path: Path, make_payload: Callable[..., bytes]
) -> None:
    async def work(engine: Engine) -> None:
        async with merging(engine) as merged:
            await merged(await submit(engine, make_payload(1)))
            await merged(await submit(engine, noisy_payload(engine.feed.state.space, 2), TEXT))

        def look(journal: Journal) -> list[str]:
            return list(privacy_problems(journal, [(k, b) for k, b, _ in journal.verify_chain().values()]))

        def spoil(statement: str) -> Callable[[Journal], list[str]]:
            def run(journal: Journal) -> list[str]:
                with journal.transaction():
                    journal.change(statement)
                return look(journal)

            return run

        def restore(journal: Journal) -> None:
            with journal.transaction():
                restore_privacy(journal)

        assert await engine.store.do(look) == []
        for statement in (
            "DELETE FROM privacy",
            "UPDATE privacy SET epsilon = epsilon / 2",
            "UPDATE privacy SET delta = 1e-3",
            "UPDATE privacy SET events = '[[4.0,2]]'",
            "INSERT INTO tasks (task_id, owner) VALUES ('acme/x', 'acme/alice')",
        ):
            problems = await engine.store.do(spoil(statement))
            assert [p.startswith("task acme/task has spent epsilon") for p in problems] == [True] * (
                "privacy" in statement
            )
            await engine.store.do(restore)
            assert await engine.store.do(look) == []

    run_engine(tmp_path / "store", work)


def test_an_update_that_several_versions_hold_is_spent_once() -> None:
    update = {"update_id": "u", "task_id": "a/t", "privacy": TEXT}
    version = {"version": 1, "updates": ["u", "other"]}
    ledgers = chained_privacy([("update", update), ("version", version), ("refused", {}), ("version", version)])
    assert ledgers["a/t"].events == ((4.0, 1),)
    assert chained_privacy([("update", update)]) == {}
    assert chained_privacy([("version", {"version": 1, "update_id": "u"})]) == {}
