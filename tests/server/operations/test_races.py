"""Two things at the same moment: a collection and an update in an old base, two restores to one place."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from share_core.errors import ConfigError
from share_core.spec_file import read_spec
from share_server.config import RetentionConfig, ServerConfig
from share_server.hub import collecting
from share_server.hub.engine import Engine
from share_server.layout import Layout
from share_server.operations import restore as restore_module
from share_server.operations.backup import MARKER, backup_stopped
from share_server.operations.restore import restore
from share_server.operations.verify import verify
from share_server.store.journal import Journal
from share_server.store.records import UpdateRow
from share_server.store.updates import accept_update, list_bound_to, list_updates
from share_server.store.versions import mark_collected, oldest_version


def test_an_update_accepted_during_a_collection_can_be_read_afterwards(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(server)
    looks: list[bool] = []
    marked: list[int] = []

    def look(journal: Journal, before: int, most: int) -> list[UpdateRow]:
        found = list_bound_to(journal, before, most)
        looks.append(not found)
        return found

    def noted(journal: Journal, before: int) -> int:
        marked.append(before)
        return mark_collected(journal, before)

    async def work() -> None:
        config = ServerConfig(retention=RetentionConfig(horizon_versions=2, snapshot_every=1))
        engine = await Engine.open(layout.store, read_spec(layout.space), config, layout.signing_key.read_bytes())
        honest = engine.store.do
        late = dataclasses.replace(
            (await honest(lambda journal: list_updates(journal, 7, 1)))[0].new, update_id=secrets.token_hex(16)
        )
        assert late.base_version == 3

        async def do(task: Callable[[Journal], Any]) -> Any:
            answer = await honest(task)
            if looks and looks[-1] and not marked:  # the last look is over, and the versions are not marked yet
                looks.clear()
                await honest(lambda journal: accept_update(journal, late, 1))
            return answer

        monkeypatch.setattr(engine.store, "do", do)
        monkeypatch.setattr(collecting, "list_bound_to", look)
        monkeypatch.setattr(collecting, "mark_collected", noted)
        try:
            assert await engine.collector.collect_now() > 0
            oldest = await honest(oldest_version)
            assert oldest == 9 and marked == [9]
            assert await honest(lambda journal: list_bound_to(journal, oldest, 1)) == []
        finally:
            await engine.close()

    asyncio.run(work())


def test_a_restore_leaves_alone_what_another_one_is_making(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_stopped(Layout(server), tmp_path / "backup")
    partial = tmp_path / "again.partial"

    def verify_while_another_begins(*rest: Any, **named: Any) -> Any:
        report = verify(*rest, **named)
        partial.mkdir()
        (partial / "server.toml").write_text("of the other one")
        return report

    monkeypatch.setattr(restore_module, "verify", verify_while_another_begins)
    with pytest.raises(ConfigError, match="could not be made"):
        restore(tmp_path / "backup", tmp_path / "again")
    assert (partial / "server.toml").read_text() == "of the other one"
    assert not (tmp_path / "again").exists()


def test_a_marker_that_says_no_version_stops_a_restore_before_it_begins(server: Path, tmp_path: Path) -> None:
    backup_stopped(Layout(server), tmp_path / "backup")
    marker = tmp_path / "backup" / MARKER
    marker.write_text(marker.read_text().replace('"version"', '"other"'))
    with pytest.raises(ConfigError, match="nothing was restored"):
        restore(tmp_path / "backup", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.partial").exists()
