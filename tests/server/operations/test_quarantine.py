"""Hostile contributions to a shared task: set aside with a reason, decided on, and all of it made again bit for bit.

Real engines on a real store, then a real hub for the operator's commands. Planted bugs: nobody is judged, a version is
published whatever it costs, a replay that does not know the rule, rows that say another state than was chained.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from share_core.robust.policy import OFF
from share_core.robust.verdicts import WHOLE
from share_core.space import task_adapter
from share_core.types import Adapter, Factors, SiteUpdate, SpaceSpec, Update
from share_core.wire import encode_update
from share_server.cli import app
from share_server.config import MergeConfig, RobustConfig, ServerConfig
from share_server.hub import judging, stepping
from share_server.hub.engine import Engine
from share_server.layout import Layout
from share_server.local import LocalHub, new_update
from share_server.operations.backup import backup_stopped
from share_server.operations.forget import forget
from share_server.operations.rebuild import rebuild
from share_server.operations.verify import verify
from share_server.operations.versions import recorded_policy
from share_server.provision import create_server, free_ports
from share_server.store.records import NewUpdate, Sharing, UpdateRow, UpdateState
from share_server.store.updates import accept_updates, decide_update, list_accepted, list_updates

SCHEMA = "ab" * 32
TASK = "acme/both"
HONEST = [f"org{i}" for i in range(6)]


def parts(spec: SpaceSpec, *weighted: tuple[float, int]) -> Adapter:
    """Return a sum of random adapters of rank 1, given as (weight, seed)."""
    found: dict[str, Factors] = {}
    for name, site in spec.sites.items():
        out, in_ = [], []
        for weight, seed in weighted:
            draw = torch.Generator().manual_seed(seed)
            out.append(weight * torch.randn(site.d_out, 1, generator=draw))
            in_.append(torch.randn(site.d_in, 1, generator=draw))
        found[name] = Factors(torch.cat(out, dim=1), torch.cat(in_, dim=1))
    return found


def honest(spec: SpaceSpec, number: int, size: float = 1.0) -> Adapter:
    """Return the stored adapter (seed 1) with half of what is to be learned (seed 2) and some noise of its own."""
    return parts(spec, (size, 1), (0.5 * size, 2), (0.4 * size, 100 + number))


def update_of(organisation: str, task_id: str, payload: bytes, shared: bool) -> NewUpdate:
    schema = SCHEMA if shared else ""
    return new_update(payload, f"{organisation}/one", task_id, sharing=Sharing(open=shared), schema_sha256=schema)


async def send(engine: Engine, *sent: tuple[str, str, Adapter]) -> list[UpdateRow]:
    """Take updates up to their receipts and merge what waits; return all rows."""
    news = []
    for organisation, task_id, adapter in sent:
        payload = encode_update(Update(0, {site: SiteUpdate(residual=own) for site, own in adapter.items()}))
        await engine.store.io(lambda payload=payload: engine.store.blobs.put(payload))  # type: ignore[misc]
        news.append(update_of(organisation, task_id, payload, task_id == TASK))
    await engine.store.do(lambda journal: accept_updates(journal, news, 1))
    while True:
        batch, _ = await engine.loop._next_batch()
        if not batch:
            return await engine.store.do(lambda journal: list_updates(journal, 0, 1000))
        await engine.loop._merge(batch)


async def attack(engine: Engine, spec: SpaceSpec) -> list[UpdateRow]:
    """Let everybody contribute: first the owner and an enemy whom nobody can outvote yet, then the others together."""
    await send(engine, ("acme", TASK, parts(spec, (1.0, 1))))
    await send(engine, ("early", TASK, parts(spec, (1.0, 1), (-3.0, 2))))
    wave = [(name, TASK, honest(spec, number)) for number, name in enumerate(HONEST)]
    wave[5] = ("org5", TASK, honest(spec, 5, 2.5))  # long, and cut
    wave.insert(2, ("flip", TASK, parts(spec, (1.0, 1), (-1.5, 2))))
    wave.insert(5, ("huge", TASK, parts(spec, (1e6, 7))))
    return await send(engine, *wave)


def expected(spec: SpaceSpec, rows: Sequence[UpdateRow], site: str) -> torch.Tensor:
    """Return the mean of the owner and the honest, the long one cut to 1.5 times the median length, the dense way."""
    said = {"acme": parts(spec, (1.0, 1)), **{name: honest(spec, n) for n, name in enumerate(HONEST)}}
    said["org5"] = honest(spec, 5, 2.5)
    everybody = {**said, "early": parts(spec, (1.0, 1), (-3.0, 2))}  # merged, so that its length counts

    def dense(adapter: Adapter, name: str) -> torch.Tensor:
        return adapter[name].out.double() @ adapter[name].in_.double().T

    def norm(adapter: Adapter) -> float:
        return float(torch.cat([dense(adapter, name).flatten() for name in spec.sites]).norm())

    lengths = sorted(norm(adapter) for adapter in everybody.values())
    most = 1.5 * (lengths[3] + lengths[4]) / 2
    merged = {row.new.organisation: row for row in rows if row.new.organisation in said}
    ages = {name: max(row.version for row in rows) - 1 - row.new.base_version for name, row in merged.items()}
    weights = {name: (1 + age) ** -0.5 for name, age in ages.items()}
    whole = sum(weights.values())
    parts_of_mean = [
        weights[name] / whole * min(1.0, most / norm(adapter)) * dense(adapter, site) for name, adapter in said.items()
    ]
    return torch.stack(parts_of_mean).sum(0)


@pytest.fixture
def made(tmp_path: Path, toy_spec: SpaceSpec) -> Callable[..., Layout]:
    """Return a function (work, config) that makes a server directory and runs work with an engine on its store."""

    def make(work: Callable[[Engine], Awaitable[None]], config: ServerConfig | None = None, name: str = "s") -> Layout:
        ports = free_ports(3)
        config = dataclasses.replace(
            config or ServerConfig(), hub_port=ports[0], enrol_port=ports[1], gateway_port=ports[2]
        )
        layout = Layout(tmp_path / name)
        create_server(layout, config, toy_spec, datetime.now(UTC))

        async def opened() -> None:
            engine = await Engine.open(layout.store, toy_spec, config, layout.signing_key.read_bytes())
            try:
                await work(engine)
            finally:
                await engine.close()

        asyncio.run(opened())
        return layout

    return make


def test_attackers_are_set_aside_and_the_operator_decides(
    made: Callable[..., Layout],
    reopen: Callable[..., LocalHub],
    toy_spec: SpaceSpec,
    tmp_path: Path,
    rewrite: Callable[[Path, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(engine: Engine) -> None:
        rows = await attack(engine, toy_spec)
        states = {row.new.organisation: row.state for row in rows}
        aside = {name for name, state in states.items() if state is UpdateState.QUARANTINED}
        assert aside == {"flip", "huge"}
        assert all(state is UpdateState.MERGED for name, state in states.items() if name not in aside)
        reasons = {row.new.organisation: row.reason for row in rows}
        assert "the cosine of what it changes" in reasons["flip"] and "less than 0.4 times" in reasons["flip"]
        assert "its length is" in reasons["huge"] and "more than 10 times" in reasons["huge"]
        stored = task_adapter(engine.feed.state.space, TASK, torch.float64)["a"]
        wanted = expected(toy_spec, rows, "a")
        assert torch.linalg.norm(stored.out @ stored.in_.T - wanted) <= 0.06 * torch.linalg.norm(wanted)

    layout = made(work)
    backup_stopped(layout, tmp_path / "backup")
    report = verify(Layout(tmp_path / "backup"), replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal == 3
    _replay_must_know_the_rule(layout, monkeypatch)

    hub = reopen(layout.root)
    hub.start()
    listed = {one["member"]: one for one in _command("quarantine", layout.root, "--json")["updates"]}
    assert set(listed) == {"flip/one", "huge/one"} and all("than" in one["reason"] for one in listed.values())
    flip, huge = listed["flip/one"]["update_id"], listed["huge/one"]["update_id"]
    assert "flip/one" in CliRunner().invoke(app, ["quarantine", str(layout.root)]).stdout
    assert _command("release", layout.root, flip, "--json")["state"] in ("ACCEPTED", "MERGED")
    refused = _command("refuse", layout.root, huge, "--reason", "ten million times too long", "--json")
    assert (refused["state"], refused["reason"]) == ("REFUSED", "ten million times too long")
    again = CliRunner().invoke(app, ["release", str(layout.root), huge])
    assert again.exit_code == 1 and "only one that is set aside" in again.stderr
    empty = CliRunner().invoke(app, ["refuse", str(layout.root), huge, "--reason", " "])
    assert empty.exit_code == 1 and "say why" in empty.stderr
    while (status := _command("status", layout.root, "--json"))["accepted"]:
        time.sleep(0.02)
    assert (status["merged"], status["refused"], status["quarantined"]) == (9, 1, 0)
    assert CliRunner().invoke(app, ["quarantine", str(layout.root)]).stdout == "nothing is set aside\n"
    assert hub.stop() == 0

    report = verify(layout, replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal == 4
    assert rebuild(layout, 24).version == 5
    assert verify(layout, replay=True).problems == []
    rewrite(layout.root, f"UPDATE updates SET released = 0 WHERE update_id = '{flip}'")
    assert any("not released, which was not chained" in one for one in verify(layout).problems)
    rewrite(layout.root, f"UPDATE updates SET state = 'QUARANTINED' WHERE update_id = '{huge}'")
    assert any("is QUARANTINED, which was not chained" in one for one in verify(layout).problems)


def _replay_must_know_the_rule(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a replay under a policy that judges nobody makes other bytes."""
    blind = lambda *of: dataclasses.replace(recorded_policy(*of), robust=OFF)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("share_server.operations.replay.recorded_policy", blind)
        report = verify(layout, replay=True)
    assert report.bit_equal < report.replayed and report.problems


def _command(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_where_nobody_is_judged_the_attackers_are_part_of_the_task(
    made: Callable[..., Layout], toy_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug, and what an operator gets who turns the filter off."""

    async def distance(engine: Engine) -> float:
        rows = await attack(engine, toy_spec)
        assert all(row.state is UpdateState.MERGED for row in rows)
        stored = task_adapter(engine.feed.state.space, TASK, torch.float64)["a"]
        wanted = expected(toy_spec, rows, "a")
        return float(torch.linalg.norm(stored.out @ stored.in_.T - wanted) / torch.linalg.norm(wanted))

    async def work(engine: Engine) -> None:
        assert await distance(engine) > 0.5

    made(work, ServerConfig(robust=RobustConfig(filter="off")), "off")
    monkeypatch.setattr(stepping, "to_set_aside", lambda *_: {})
    monkeypatch.setattr(judging, "judge", lambda voices, *_: [WHOLE] * len(voices))
    made(work, None, "planted")


@pytest.mark.parametrize("mixing", ["fedasync", "fedbuff"])
def test_where_tasks_move_by_steps_the_same_are_set_aside(
    mixing: str, made: Callable[..., Layout], toy_spec: SpaceSpec
) -> None:
    async def work(engine: Engine) -> None:
        rows = await attack(engine, toy_spec)
        aside = {row.new.organisation for row in rows if row.state is UpdateState.QUARANTINED}
        assert aside == {"flip", "huge"}
        # Two of one organisation: each in a version of its own, so that neither moves the task unjudged.
        twice = [("org1", TASK, parts(toy_spec, (-1.0, 1))), ("org1", TASK, honest(toy_spec, 1))]
        rows = await send(engine, *twice)
        assert [row.state for row in rows[-2:]] == [UpdateState.QUARANTINED, UpdateState.MERGED]

    layout = made(work, ServerConfig(merge=MergeConfig(mixing=mixing)))
    report = verify(layout, replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal


def test_a_version_that_costs_others_too_much_is_held(
    made: Callable[..., Layout], toy_spec: SpaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig(robust=RobustConfig(influence=1.0, past=0.1))
    stored = [("archive", f"archive/t{i}", parts(toy_spec, (1.0, 2 * i), (1.0, 2 * i + 1))) for i in range(6)]

    def crowd(number: int) -> Adapter:
        """Return a task of one subspace of eight directions, which it shares with the others of the crowd."""
        found: dict[str, Factors] = {}
        for name, own in parts(toy_spec, *((1.0, 500 + i) for i in range(8))).items():
            turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(number))).Q
            found[name] = Factors(own.out @ turn, own.in_)
        return found

    attackers = [("rival", f"rival/t{i}", crowd(i)) for i in range(6)]
    growth: list[float] = []

    async def work(engine: Engine) -> None:
        await send(engine, *stored)
        before = engine.feed.state.ledger
        rows = await send(engine, *attackers[:3], ("bolt", "bolt/t", stored[0][2]), *attackers[3:])
        found = {row.new.task_id: row for row in rows}
        growth.append(max(engine.feed.state.ledger[t].bound - before[t].bound for _, t, _ in stored))
        if engine.loop._policy.robust.past < 1:
            assert found["bolt/t"].state is UpdateState.MERGED
            aside = [row for row in rows if row.state is UpdateState.QUARANTINED]
            assert aside and all("to the relative error of task archive/" in row.reason for row in aside)
            assert {row.new.organisation for row in aside} == {"rival"}

    layout = made(work, config)
    report = verify(layout, replay=True)
    assert report.problems == [] and report.bit_equal == report.replayed
    made(work, ServerConfig(robust=RobustConfig(influence=1.0, past=1.0)), "unheld")
    monkeypatch.setattr(stepping, "harm_of", lambda *_: None)
    with pytest.raises(AssertionError):
        made(work, config, "planted")
    assert growth[0] < growth[1]


def test_released_too_late_it_is_refused(made: Callable[..., Layout], toy_spec: SpaceSpec) -> None:
    """A newer update of its organisation is merged: the older one may not take its place."""

    async def work(engine: Engine) -> None:
        rows = await attack(engine, toy_spec)
        flip = next(row for row in rows if row.new.organisation == "flip")
        await send(engine, ("flip", TASK, honest(toy_spec, 50)))
        await engine.store.do(lambda journal: decide_update(journal, flip.new.update_id, True, ""))
        assert [row.released for row in await engine.store.do(lambda j: list_accepted(j, 9))] == [True]
        rows = await send(engine)
        late = next(row for row in rows if row.new.update_id == flip.new.update_id)
        assert late.state is UpdateState.REFUSED and "newer update" in late.reason

    layout = made(work)
    # Without some of the crowd others may be outvoted; what was merged is made again all the same.
    for name in ("org0", "org3", "flip"):
        forget(layout, name)
    report = verify(layout, replay=True)
    assert report.problems == [] and report.bit_equal == report.replayed
