"""A federation with a past to forget from, what a replay of the others gives, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import random
import secrets
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from share_core.fingerprint import describe_space
from share_core.ledger import TaskLedger
from share_core.merge import HubState
from share_core.space import update_adapter
from share_core.types import Core, Factors, SiteUpdate, Space, SpaceSpec, Update
from share_core.wire import decode_update, encode_adapter, encode_snapshot, encode_update
from share_server.config import RetentionConfig, ServerConfig
from share_server.hub.engine import Engine
from share_server.hub.policy import policy_of
from share_server.hub.uploads import key_prefix
from share_server.layout import Layout
from share_server.local import new_update
from share_server.operations.rebuild import rebuild
from share_server.operations.remaking import remake
from share_server.operations.verify import verify
from share_server.provision import create_server
from share_server.store.journal import Journal
from share_server.store.records import EvaluationRow, NewUpdate, Sharing
from share_server.store.recovery import all_updates
from share_server.store.reports import list_evaluations, record_evaluations
from share_server.store.updates import accept_update, keep_original
from share_server.store.versions import list_tasks, read_ledger, read_version

SPEC = describe_space("one", {"w": torch.eye(24, 16)}, k_max=10, rank_limit=8)
"""One small site: two updates fill it, then it compacts."""
REBUILT = 12
"""k_max of the rebuilt space."""

CONFIG = ServerConfig(
    hub_port=7801,
    enrol_port=7802,
    gateway_port=7803,
    retention=RetentionConfig(horizon_versions=30, snapshot_every=16),
)
"""Some versions of a long history are collected on the way: some originals are written before anybody is forgotten."""

SEED = 20
"""Under it a short past, too, holds everything that makes a difference; see :func:`lived`."""
MEMBERS = ("acme/alice", "bolt/bob", "cord/cid", "cord/dan")
SHARED = "cord/shared"


@dataclass
class Past:
    """What a federation has lived through, as the test itself remembers it."""

    layout: Layout
    config: ServerConfig = CONFIG
    spec: SpaceSpec = SPEC
    groups: list[list[tuple[NewUpdate, bytes]]] = field(default_factory=list)
    """Per version the updates that it merged, with their payloads; none for a rebuilt one."""
    waiting: list[tuple[NewUpdate, bytes]] = field(default_factory=list)
    spaces: list[Space] = field(default_factory=lambda: [Space(0, {}, {})])
    """Every version."""

    def meant(self, new: NewUpdate, payload: bytes) -> bytes:
        """Return what an update meant when it was sent, as the ambient factors that are kept of it."""
        bases = self.spaces[max(1, new.base_version)].bases  # a free update does not look at them
        return encode_adapter(update_adapter(decode_update(payload, SPEC), bases))

    def of(self, *names: str) -> dict[str, bytes]:
        """Return the payload of every update of some contributors, by id."""
        sent = [one for group in [*self.groups, self.waiting] for one in group]
        return {new.update_id: payload for new, payload in sent if _is_of(new, names)}

    def open(self, work: Callable[[Engine], Awaitable[None]]) -> None:
        """Run ``work`` with an engine on the server's store, as a start of the hub would."""

        async def run() -> None:
            key = self.layout.signing_key.read_bytes()
            engine = await Engine.open(self.layout.store, self.spec, self.config, key)
            try:
                await work(engine)
            finally:
                await engine.close()

        torch.set_num_threads(1)
        asyncio.run(run())

    def copy(self, root: Path) -> Past:
        """Return the same past on a copy of the server directory."""
        shutil.copytree(self.layout.root, root)
        return replace(self, layout=Layout(root))


def _is_of(new: NewUpdate, names: tuple[str, ...]) -> bool:
    return new.member in names or new.organisation in names


def _payload(seed: int, space: Space | None) -> bytes:
    """Return a free update of rank 2, or cores and one direction in a given version."""
    draw = torch.Generator().manual_seed(seed)
    residual = Factors(torch.randn(24, 2, generator=draw), torch.randn(16, 2, generator=draw))
    core = None
    if space is not None:
        basis = space.bases["w"]
        core = Core(torch.randn(basis.k_out, 2, generator=draw), torch.randn(basis.k_in, 2, generator=draw))
    return encode_update(Update(0 if space is None else space.version, {"w": SiteUpdate(core, residual)}))


def _new(member: str, task: str, base: int, payload: bytes) -> NewUpdate:
    sharing, schema = Sharing(open=task == SHARED), "5c" * 32 if task == SHARED else ""
    return new_update(payload, member, task, base_version=base, sharing=sharing, schema_sha256=schema)


async def _take(engine: Engine, new: NewUpdate, payload: bytes) -> None:
    await engine.store.io(lambda: engine.store.blobs.put(payload))
    await engine.store.do(lambda journal: accept_update(journal, new, 1))


async def _merge_waiting(engine: Engine) -> None:
    while (batch := await engine.loop._next_batch())[0]:
        await engine.loop._merge(batch[0])
        await engine.collector.collect()


def _live(past: Past, groups: int, draw: random.Random, every: int) -> None:
    """Let members of three organisations submit, in stale bases, several at once, to their own tasks and one of all."""

    def group(oldest: int, newest: int) -> list[tuple[NewUpdate, bytes]]:
        found: list[tuple[NewUpdate, bytes]] = []
        for member in draw.sample(MEMBERS, 4 if draw.randrange(every) == 0 else 1):
            organisation = member.split("/")[0]
            task = draw.choice((SHARED, SHARED, f"{organisation}/a", f"{organisation}/b"))
            base = max(oldest, newest - draw.randrange(6))
            payload = _payload(draw.randrange(2**40), past.spaces[base] if base else None)
            if task == SHARED or task not in {new.task_id for new, _ in found}:  # as one version can take them
                found.append((_new(member, task, base, payload), payload))
        return found

    async def work(engine: Engine) -> None:
        for _ in range(groups):
            fresh = group(engine.feed.oldest, engine.feed.version)
            if not past.groups:  # what two send alike is one file
                alike = _payload(1, None)
                fresh = [(_new("cord/cid", SHARED, 0, alike), alike), (_new("acme/alice", "acme/a", 0, alike), alike)]
            for new, payload in fresh:
                await _take(engine, new, payload)
            await _merge_waiting(engine)
            past.groups.append(fresh)
            past.spaces.append(engine.feed.state.space)
            assert engine.feed.version == len(past.groups)

    past.open(work)


def _lived(root: Path, versions: int, config: ServerConfig = CONFIG, every: int = 4) -> Past:
    """Make a server with ``versions`` versions, one of them rebuilt, evaluations, updates that wait, and an upload.

    About one version in ``every`` takes several updates.
    """
    past, draw = Past(Layout(root), config), random.Random(SEED)
    create_server(past.layout, config, SPEC, datetime.now(UTC))
    _live(past, versions // 2, draw, every)
    assert rebuild(past.layout, REBUILT).version == versions // 2 + 1
    past.groups.append([])
    past.spec = replace(SPEC, k_max=REBUILT)

    async def look(engine: Engine) -> None:
        past.spaces.append(engine.feed.state.space)

    past.open(look)
    _live(past, versions - versions // 2 - 1, draw, every)

    async def wait(engine: Engine) -> None:
        for member in ("acme/alice", "cord/cid", "dusk/eve"):
            base = engine.feed.version - 2
            payload = _payload(draw.randrange(2**40), past.spaces[base])
            past.waiting.append((_new(member, f"{member.split('/')[0]}/waits", base, payload), payload))
            await _take(engine, *past.waiting[-1])
        staged = engine.store.blobs.stage(f"{key_prefix('cord/cid')}{secrets.token_hex(16)}")
        staged.write(b"half an update of cord")
        staged.suspend()
        scalars = [EvaluationRow(task, 3, "accuracy", 0.5, 9) for task in ("acme/a", SHARED, "cord/a")]
        await engine.store.do(lambda journal: record_evaluations(journal, scalars))

    past.open(wait)
    return past


def _replayed(past: Past, root: Path, *names: str) -> tuple[bytes, dict[str, TaskLedger]]:
    """Feed a fresh store with what the others meant, in the same groups; return its snapshot and its ledger.

    Versions keep their numbers where one is left out, since ages of updates are counted in them.
    """
    key = past.layout.signing_key.read_bytes()

    async def run() -> tuple[bytes, dict[str, TaskLedger]]:
        engine = await Engine.open(root, SPEC, replace(past.config, retention=RetentionConfig()), key)
        try:
            for version, group in enumerate(past.groups, start=1):
                state = engine.feed.state
                if not group:
                    policy = policy_of(past.spec, past.config.merge)
                    state = await remake(engine.store, engine.loop._contents, state, policy, past.spec)
                    engine.loop._policy = policy
                if not (rest := [one for one in group if not _is_of(one[0], names)]):
                    await engine.store.do(_move_head)
                    engine.feed.publish(HubState(replace(state.space, version=version), state.ledger))
                for new, payload in rest:
                    await _take(engine, new, payload)
                    await _keep_original(engine, new.update_id, past.meant(new, payload))
                await _merge_waiting(engine)
                assert engine.feed.version == version
            state = engine.feed.state
            return encode_snapshot(replace(state.space, version=len(past.groups) + 1)), dict(state.ledger)
        finally:
            await engine.close()

    torch.set_num_threads(1)
    return asyncio.run(run())


def _move_head(journal: Journal) -> None:
    with journal.transaction():
        journal.change("UPDATE head SET version = version + 1")


async def _keep_original(engine: Engine, update_id: str, original: bytes) -> None:
    digest = await engine.store.io(lambda: engine.store.blobs.put(original))

    def keep(journal: Journal) -> None:
        with journal.transaction():
            keep_original(journal, update_id, digest, len(original))

    await engine.store.do(keep)


def _broken(past: Past, expected: tuple[bytes, Mapping[str, TaskLedger]], *names: str) -> list[str]:
    """Return in words what does not hold of a server that has forgotten ``names`` in one go."""
    broken = [f"verify: {problem}" for problem in verify(past.layout).problems]
    own, version = past.of(*names), len(past.groups) + 1
    sent = {one[0].update_id: one for group in [*past.groups, past.waiting] for one in group}
    others = {name: one for name, one in sent.items() if name not in own}
    merged = {new.update_id: number for number, group in enumerate(past.groups, 1) for new, _ in group}

    async def look(engine: Engine) -> None:
        row = await engine.store.do(lambda journal: read_version(journal, version))
        if row.snapshot_sha256 is None or engine.store.blobs.read(row.snapshot_sha256) != expected[0]:
            broken.append("the snapshot is not that of the replay")
        if await engine.store.do(read_ledger) != expected[1]:
            broken.append("the ledger is not that of the replay")
        rows = await engine.store.do(all_updates)
        for update in rows:
            name = update.new.update_id
            state = "FORGOTTEN" if name in own else "MERGED" if name in merged else "ACCEPTED"
            if (update.state.value, update.version) != (state, merged.get(name, 0) if state == "MERGED" else 0):
                broken.append(f"update {name} is {update.state.value} in version {update.version}")
            if name in others:
                says = encode_adapter(await engine.loop._contents.of_update(update))
                if says != past.meant(*others[name]):
                    broken.append(f"update {name} of another one does not mean what it meant")
        if len(rows) != len(sent):
            broken.append("rows are missing")
        tasks = {row.task_id for row in await engine.store.do(list_tasks)}
        if tasks != {others[name][0].task_id for name in others if name in merged} or tasks != set(expected[1]):
            broken.append(f"the tasks are {tasks}")
        if {row.task_id for row in await engine.store.do(list_evaluations)} != {"acme/a", SHARED, "cord/a"} & tasks:
            broken.append("evaluations of a task that is gone, or not those of one that stays")

    past.open(look)
    return broken + _traces(past, *names)


def _traces(past: Past, *names: str) -> list[str]:
    """Return what is on the disk of somebody who is forgotten: payloads, their bytes in other files, uploads."""
    own = past.of(*names)
    kept = {payload for name, payload in past.of(*MEMBERS).items() if name not in own}
    tails = {payload[-64:] for payload in own.values() if payload not in kept}
    assert tails
    if {"cord", "cord/cid"} & set(names):
        tails.add(b"half an update of cord")
    found = []
    for path in sorted(path for path in past.layout.root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if any(tail in data for tail in tails):
            found.append(f"{path.relative_to(past.layout.root)} holds what was forgotten")
    return found


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Past:
    """A short past, to copy: without cord some versions are empty, some take several, and others share a task."""
    past = _lived(tmp_path_factory.mktemp("lived") / "server", 14)
    rest = [[new for new, _ in group if new.organisation != "cord"] for group in past.groups]
    assert sum(bool(group) and not left for group, left in zip(past.groups, rest, strict=True)) > 1
    assert sum(len({new.task_id for new in left}) > 1 for left in rest) > 1
    assert {new.organisation for left in rest[8:] for new in left if new.task_id == SHARED} == {"acme", "bolt"}
    return past


@pytest.fixture(scope="module")
def expected(lived: Past, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, TaskLedger]]:
    """What that past is without cord."""
    return _replayed(lived, tmp_path_factory.mktemp("fresh") / "store", "cord")


@pytest.fixture
def past(lived: Past, tmp_path: Path) -> Past:
    """A copy of it, to forget in."""
    return lived.copy(tmp_path / "server")


@pytest.fixture(scope="session")
def forgetting() -> Any:
    """The functions above, for test modules, which cannot import each other."""

    class Forgetting:
        spec = SPEC
        config = CONFIG
        lived = staticmethod(_lived)
        replayed = staticmethod(_replayed)
        broken = staticmethod(_broken)
        traces = staticmethod(_traces)
        payload = staticmethod(_payload)
        new = staticmethod(_new)
        take = staticmethod(_take)
        merge_waiting = staticmethod(_merge_waiting)

    return Forgetting
