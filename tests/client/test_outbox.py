"""The outbox, killed at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from share_client.outbox import Entry, Outbox, Training, list_outbox
from share_core.errors import ConfigError, DigestError

TRAINING = Training("task", "hash", base_version=0, loss=0.1, steps=1, seconds=1.0, rows=5)


def put(box: Outbox) -> Entry:
    return box.put(b"payload", b"head", TRAINING, space_id="s", task_id="org/task", create=True)


def test_sigkill_at_every_step(tmp_path: Path, run_script: Callable[..., dict[str, Any]]) -> None:
    answers = run_script("outbox_kills.py", str(tmp_path), small=True)
    healthy = answers.pop("")
    assert healthy["wrong"] == []
    assert healthy["points"] >= 40
    missed = [bug for bug, answer in answers.items() if not answer["wrong"]]
    assert len(answers) == 7
    assert missed == [], "planted bugs that the kills do not catch"


def test_entries_come_in_the_order_in_which_they_were_put(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    ids = [put(box).update_id for _ in range(5)]
    again = Outbox(tmp_path)
    again.acknowledge(again.entries()[0], {"ingest_seq": 1})
    assert [entry.update_id for entry in again.entries()] == ids
    assert [entry.acknowledged for entry in again.entries()] == [True, False, False, False, False]


def test_a_damaged_payload_is_not_sent(tmp_path: Path) -> None:
    entry = put(Outbox(tmp_path))
    (entry.directory / "payload.safetensors").write_bytes(b"pAyload")
    with pytest.raises(DigestError, match="trained again"):
        entry.read_payload()


def test_a_foreign_directory_is_named(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    (tmp_path / "holiday-photos").mkdir()
    with pytest.raises(ConfigError, match="holiday-photos"):
        box.entries()


def test_looking_changes_nothing(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.refuse(put(box), "AccessError", "not yours")
    waiting = put(box)
    before = sorted(tmp_path.rglob("*"))
    found, refused = list_outbox(tmp_path)
    assert found == [waiting]
    assert [reason for _, reason in refused] == ["AccessError: not yours"]
    assert sorted(tmp_path.rglob("*")) == before
    assert list_outbox(tmp_path / "nothing") == ([], [])
