"""The space before the attack, and what becomes of it when everybody has submitted: a real store, without a network."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from share_core.identity import Identity, make_authority, make_signer
from share_core.merge import HubState
from share_core.types import Space, SpaceSpec
from share_core.wire import payload_bytes
from share_server.config import ServerConfig
from share_server.hub.engine import Engine
from share_server.store.records import PRIVATE, NewUpdate, Sharing, UpdateRow, UpdateState
from share_server.store.recovery import all_updates
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

    @property
    def space(self) -> Space:
        """The newest version."""
        return self.state.space

    def share(self, organisations: set[str], state: UpdateState) -> float:
        """Return which share of these organisations' updates of the attacked round ended in a state."""
        own = [row for row in self.rows if row.new.organisation in organisations and row.new.base_version > 0]
        return sum(row.state is state for row in own) / len(own) if own else 0.0


def signing_key() -> bytes:
    """Return a key for the versions of a benchmark."""
    now = datetime.now(UTC)
    return make_signer(*make_authority("bench", now), Identity("signer", "server", "hub"), now, 1)[1]


def run_store(
    root: Path, spec: SpaceSpec, config: ServerConfig, key: bytes, waves: Sequence[Sequence[Sent]]
) -> Outcome:
    """Submit wave after wave to the store under ``root`` and merge each with the hub's own loop; return what there is.

    The updates of a wave wait together, as they do at a busy hub.
    """
    return asyncio.run(_run(root, spec, config, key, waves))


async def _run(
    root: Path, spec: SpaceSpec, config: ServerConfig, key: bytes, waves: Sequence[Sequence[Sent]]
) -> Outcome:
    engine = await Engine.open(root, spec, config, key)
    try:
        merging = asyncio.create_task(engine.loop.run())
        for wave in waves:
            news = [_new(number, sent) for number, sent in enumerate(wave)]
            for sent in wave:
                await engine.store.io(lambda sent=sent: engine.store.blobs.put(sent.payload))  # type: ignore[misc]
            answers = await engine.store.do(lambda journal, news=news: accept_updates(journal, news, 1))  # type: ignore[misc]
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            engine.loop.wake()
            while not merging.done() and await engine.store.do(lambda journal: list_accepted(journal, 1)):
                await asyncio.sleep(0.02)
        engine.loop.stop()
        await merging
        return Outcome(engine.feed.state, tuple(await engine.store.do(all_updates)))
    finally:
        await engine.close()


def _new(number: int, sent: Sent) -> NewUpdate:
    split = payload_bytes(sent.payload)
    digest = hashlib.sha256(sent.payload).hexdigest()
    name = f"{number} {sent.organisation} {sent.task_id} {digest}"
    return NewUpdate(
        update_id=hashlib.sha256(name.encode()).hexdigest()[:32],
        member=f"{sent.organisation}/one",
        task_id=sent.task_id,
        create=True,
        base_version=sent.base_version,
        sha256=digest,
        size=len(sent.payload),
        coefficients=split.coefficients,
        directions=split.directions,
        heads=split.heads,
        envelope=split.envelope,
        lease_id="",
        rows=0,
        sharing=Sharing(open=True) if sent.open else PRIVATE,
        schema_sha256=SCHEMA if sent.open else "",
    )
