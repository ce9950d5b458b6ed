"""Looking into an outbox while a session empties it."""

from __future__ import annotations

from pathlib import Path

import pytest

from share_client import outbox as module
from share_client.outbox import Outbox, Training, list_outbox
from share_core.errors import ConfigError

TRAINING = Training("task", "hash", base_version=0, loss=0.1, steps=1, seconds=1.0, rows=5)


def test_an_entry_that_goes_while_it_is_looked_at_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Outbox(tmp_path)
    first, second = (
        box.put(b"payload", b"head", TRAINING, space_id="s", task_id="org/task", create=True) for _ in range(2)
    )
    listed = module._entry_directories

    def slowly(directory: Path) -> list[Path]:
        found = listed(directory)
        if first.directory in found:
            box.remove(first)
        return found

    monkeypatch.setattr(module, "_entry_directories", slowly)
    waiting, refused = list_outbox(tmp_path)
    assert [entry.update_id for entry in waiting] == [second.update_id]
    assert refused == []


def test_what_is_there_and_no_entry_is_still_named(tmp_path: Path) -> None:
    Outbox(tmp_path)
    (tmp_path / "strange").mkdir()
    with pytest.raises(ConfigError, match="strange"):
        list_outbox(tmp_path)
