"""Verification, replay and rebuilding under retention, and under every rule by which shared tasks are mixed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from share_core.spec_file import read_spec
from share_server.config import RetentionConfig, ServerConfig
from share_server.hub.engine import Engine
from share_server.layout import Layout
from share_server.local import LocalHub
from share_server.operations.rebuild import rebuild
from share_server.operations.verify import verify
from share_server.store.versions import oldest_version


def _collect(layout: Layout) -> int:
    """Remove all but the newest versions; return the oldest that is kept."""

    async def work() -> int:
        config = ServerConfig(retention=RetentionConfig(horizon_versions=2, snapshot_every=1))
        engine = await Engine.open(layout.store, read_spec(layout.space), config, layout.signing_key.read_bytes())
        try:
            assert await engine.collector.collect_now() > 0
            return await engine.store.do(oldest_version)
        finally:
            await engine.close()

    return asyncio.run(work())


def test_a_collected_store_is_proved_replayed_and_rebuilt(server: Path) -> None:
    layout = Layout(server)
    oldest = _collect(layout)
    assert oldest == 9
    report = verify(layout, replay=True)
    assert report.problems == [] and report.versions == 11 and report.replayed == 2
    assert report.largest_distance <= 1e-6
    assert any("from version 9" in note for note in report.notes)
    made = rebuild(layout, 24)
    assert len(made.tasks) == 8
    assert all(task.after <= made.tau for task in made.tasks), made.tasks  # from originals written by the collection
    report = verify(layout, replay=True)
    assert report.problems == [] and report.replayed == 3


@pytest.mark.parametrize("mixing", ["mean", "fedasync", "fedbuff"])
def test_every_rule_of_mixing_is_replayed_and_rebuilt(
    mixing: str, new_hub: Callable[..., LocalHub], live: Callable[[LocalHub], Any], make_payload: Callable[..., bytes]
) -> None:
    hub = new_hub()
    text = hub.layout.config.read_text()
    assert 'mixing = "mean"' in text
    hub.layout.config.write_text(text.replace('mixing = "mean"', f'mixing = "{mixing}"'))
    hub.start()
    life = live(hub)
    for number in range(4):
        member = ("acme/alice", "bolt/bob")[number % 2]
        space = life.fetch(member) if number > 1 else None
        life.submit(member, "acme/shared", make_payload(number, space))
        life.submit(member, f"{member.split('/')[0]}/own", make_payload(10 + number))
    assert hub.stop() == 0
    report = verify(hub.layout, replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal == 8
    before = rebuild(hub.layout, 12, 0.04).tasks
    made = rebuild(hub.layout, 24)
    for tasks in (before, made.tasks):
        assert {task.task_id for task in tasks} == {"acme/shared", "acme/own", "bolt/own"}
    for task in made.tasks:
        # A task that was moved by steps is known from the version before alone: what that lost cannot come back.
        assert task.after <= (0.04 if mixing == "mean" or "own" in task.task_id else task.before + 0.04), task
    report = verify(hub.layout, replay=True)
    assert report.problems == [] and report.replayed == report.bit_equal == 10
