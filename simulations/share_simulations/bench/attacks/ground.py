"""The space before the attack, and what becomes of it when everybody has submitted: a real store, without a network."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from share_core.errors import FedshareError
from share_core.identity import Identity, make_authority, make_signer
from share_core.merge import HubState
from share_core.types import Space, SpaceSpec
from share_server.config import ServerConfig
from share_server.hub.contents import Contents
from share_server.hub.engine import Engine
from share_server.hub.judging import newest_of_each, verdicts_on
from share_server.hub.policy import policy_of
from share_server.local import new_update
from share_server.store.records import PRIVATE, NewUpdate, Sharing, UpdateRow, UpdateState
from share_server.store.recovery import all_updates
from share_server.store.store import Store
from share_server.store.updates import accept_updates, list_accepted

SCHEMA = hashlib.sha256(b"the labels of this benchmark").hexdigest()


@dataclass(frozen=True)
class Sent:
    """One update that somebody submits."""

    organisation: str
    task_id: str
    payload: bytes
    base_version: int
    open: bool = False
    """Whether it creates a task that everybody may contribute to."""


@dataclass(frozen=True)
class Outcome:
    """What the hub made of everything."""

    state: HubState
    """The newest version and ledger."""
    rows: tuple[UpdateRow, ...]
    """Every update in order of arrival."""
    weightless: frozenset[str] = frozenset()
    """Ids of merged updates of shared tasks that the others outvote: they have no weight any more."""

    @property
    def space(self) -> Space:
        """The newest version."""
        return self.state.space

    def stopped(self, organisations: Collection[str]) -> float:
        """Return which share of these organisations' updates, of those based on a version, does not count."""
        own = [row for row in self.rows if row.new.organisation in organisations and row.new.base_version > 0]
        gone = [row for row in own if row.state is not UpdateState.MERGED or row.new.update_id in self.weightless]
        return len(gone) / len(own) if own else 0.0

    def kept_out(self, organisations: Collection[str]) -> float:
        """Return which share of these organisations' own tasks, which are based on nothing, is not merged."""
        own = [row for row in self.rows if row.new.organisation in organisations and row.new.base_version == 0]
        return sum(row.state is not UpdateState.MERGED for row in own) / len(own) if own else 0.0


def signing_key() -> bytes:
    """Return a key for the versions of a benchmark."""
    now = datetime.now(UTC)
    return make_signer(*make_authority("bench", now), Identity("signer", "server", "hub"), now, 1)[1]


def run_store(root: Path, spec: SpaceSpec, config: ServerConfig, key: bytes, wave: Sequence[Sent]) -> Outcome:
    """Submit updates to the store under ``root`` and merge them with the hub's own loop; return what there is then.

    All of them wait together, in the given order, as they do at a busy hub.
    """
    return asyncio.run(_run(root, spec, config, key, wave))


async def _run(root: Path, spec: SpaceSpec, config: ServerConfig, key: bytes, wave: Sequence[Sent]) -> Outcome:
    engine = await Engine.open(root, spec, config, key)
    try:
        await _accept(engine.store, wave)
        merging = asyncio.create_task(engine.loop.run())
        while not merging.done() and await _waits(engine.store):
            await asyncio.sleep(0.02)
        engine.loop.stop()
        await merging
        rows = tuple(await engine.store.do(all_updates))
        return Outcome(engine.feed.state, rows, await _weightless(engine, spec, config))
    finally:
        await engine.close()


async def _waits(store: Store) -> bool:
    return len(await store.do(lambda journal: list_accepted(journal, 1))) > 0


async def _accept(store: Store, wave: Sequence[Sent]) -> None:
    """Take the updates up to their receipts."""
    for sent in wave:
        await store.io(lambda sent=sent: store.blobs.put(sent.payload))  # type: ignore[misc]
    news = [_new(number, sent) for number, sent in enumerate(wave)]
    for answer in await store.do(lambda journal: accept_updates(journal, news, 1)):
        if isinstance(answer, FedshareError):
            raise answer


async def _weightless(engine: Engine, spec: SpaceSpec, config: ServerConfig) -> frozenset[str]:
    """Ask the hub's own rule who counts in the newest version."""
    contents = Contents(engine.store, spec, engine.history)
    policy = policy_of(spec, config.merge, config.robust.policy)
    found: set[str] = set()
    for task in engine.feed.state.space.cores:
        if await contents.is_shared(task):
            said = await contents.background(task, engine.feed.version, policy)
            newest = newest_of_each(said.older)
            verdicts = zip(newest, verdicts_on(newest, said.start, policy), strict=True)
            found.update(one.row.new.update_id for one, verdict in verdicts if not verdict.counts)
    return frozenset(found)


def _new(number: int, sent: Sent) -> NewUpdate:
    name = f"{number} {sent.organisation} {sent.task_id} {hashlib.sha256(sent.payload).hexdigest()}"
    return new_update(
        sent.payload,
        f"{sent.organisation}/one",
        sent.task_id,
        base_version=sent.base_version,
        update_id=hashlib.sha256(name.encode()).hexdigest()[:32],
        sharing=Sharing(open=True) if sent.open else PRIVATE,
        schema_sha256=SCHEMA if sent.open else "",
    )
