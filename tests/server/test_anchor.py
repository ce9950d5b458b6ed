"""Anchor and page sums: what SQLite alone would not notice. Each check is shown to be needed by leaving it out."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from share_core.errors import StorageError
from share_server.store.anchor import SECTOR, Anchor, Mark
from share_server.store.journal import Journal
from share_server.store.members import add_traffic
from share_server.store.pages import PAGE, PageSums
from share_server.store.records import NewUpdate
from share_server.store.updates import accept_update, list_updates

SPACE = "sha256:1"


def _new(number: int) -> NewUpdate:
    return NewUpdate(
        update_id=secrets.token_hex(16),
        member="acme/alice",
        task_id=f"acme/t{number}",
        create=True,
        base_version=0,
        sha256="ab" * 32,
        size=7,
        coefficients=1,
        directions=2,
        heads=3,
        envelope=1,
        lease_id="",
        rows=0,
    )


def _killed(root: Path, count: int = 6) -> Path:
    """Return a journal as a kill leaves it: everything since the last checkpoint is in the log only."""
    live = root / "live"
    live.mkdir(parents=True)
    journal = Journal(live / "journal.db", SPACE)
    for number in range(count):
        accept_update(journal, _new(number), number)
    add_traffic(journal, [("acme/alice", 5, 7, 0)])  # a transaction without an entry in the chain
    shutil.copytree(live, root / "killed")
    journal.close()
    return root / "killed" / "journal.db"


def _stopped(root: Path) -> Path:
    """Return a journal as a clean stop leaves it."""
    path = _killed(root)
    Journal(path, SPACE).close()
    return path


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def test_a_killed_journal_opens_with_everything_it_promised(tmp_path: Path) -> None:
    path = _killed(tmp_path)
    assert path.with_name("journal.db-wal").stat().st_size > 0
    for _ in range(2):
        journal = Journal(path, SPACE)
        assert len(list_updates(journal, 0, 100)) == 6
        journal.close()
    assert not path.with_name("journal.db-wal").exists()


def test_a_flip_in_the_log_would_lose_promises_and_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _killed(tmp_path)
    log = path.with_name("journal.db-wal")
    _flip(log, log.stat().st_size // 2)
    with pytest.raises(StorageError, match="anchor says"):
        Journal(path, SPACE)
    with monkeypatch.context() as patch:  # without the comparison it opens, and updates are gone without a word
        patch.setattr(Journal, "_compare_with_anchor", lambda self: None)
        again = _killed(tmp_path / "unguarded")
        log = again.with_name("journal.db-wal")
        _flip(log, log.stat().st_size // 2)
        journal = Journal(again, SPACE)
        assert len(list_updates(journal, 0, 100)) < 6
        journal.close()


def test_a_lost_transaction_without_an_entry_is_refused_too(tmp_path: Path) -> None:
    path = _killed(tmp_path)
    log = path.with_name("journal.db-wal")
    _flip(log, log.stat().st_size - 5)
    with pytest.raises(StorageError, match="anchor says"):
        Journal(path, SPACE)


@pytest.mark.parametrize("part", ["header", "used", "unused"])
def test_a_flip_anywhere_in_the_file_is_refused(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _stopped(tmp_path)
    data = path.read_bytes()
    page = data[PAGE : 2 * PAGE]
    at = {"header": 50, "used": data.rindex(b"acme/t3"), "unused": PAGE + page.rindex(bytes(64)) + 8}[part]
    _flip(path, at)
    with pytest.raises(StorageError, match="page"):
        Journal(path, SPACE)
    if part == "unused":
        with monkeypatch.context() as patch:  # SQLite's own check does not see it
            patch.setattr(PageSums, "check", lambda self: None)
            Journal(path, SPACE).close()


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("at", [0, 20, 30, 60, 300, 510])
def test_a_flip_in_the_anchor_is_refused(tmp_path: Path, slot: int, at: int) -> None:
    path = _stopped(tmp_path)
    _flip(path.with_name("anchor"), slot * SECTOR + at)
    with pytest.raises(StorageError, match="anchor"):
        Journal(path, SPACE)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "sums flipped": (lambda path: _flip(path.with_name("journal.sums"), 20), "page sums"),
    "sums gone": (lambda path: path.with_name("journal.sums").unlink(), "page 1"),
    "anchor gone": (lambda path: path.with_name("anchor").unlink(), "anchor"),
    "journal cut": (lambda path: path.write_bytes(path.read_bytes()[:-PAGE]), "ends after"),
    "journal gone": (lambda path: path.unlink(), "gone"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_missing_or_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = _stopped(tmp_path)
    break_it, words = DAMAGE[damage]
    break_it(path)
    with pytest.raises(StorageError, match=words):
        Journal(path, SPACE)


def test_an_anchor_of_another_time_is_refused(tmp_path: Path) -> None:
    path = _stopped(tmp_path)
    old = path.with_name("anchor").read_bytes()
    journal = Journal(path, SPACE)
    for number in range(3):
        accept_update(journal, _new(10 + number), 1)
    journal.close()
    path.with_name("anchor").write_bytes(old)
    with pytest.raises(StorageError, match="another time"):
        Journal(path, SPACE)


def test_a_kill_between_commit_and_anchor_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = tmp_path / "live"
    live.mkdir()
    journal = Journal(live / "journal.db", SPACE)
    accept_update(journal, _new(1), 1)
    with monkeypatch.context() as patch:

        def killed(self: Anchor, mark: Mark) -> None:
            raise KeyboardInterrupt

        patch.setattr(Anchor, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            accept_update(journal, _new(2), 2)
    shutil.copytree(live, tmp_path / "later")
    later = Journal(tmp_path / "later" / "journal.db", SPACE)
    assert len(list_updates(later, 0, 10)) == 2
    accept_update(later, _new(3), 3)
    later.close()
    journal.close()


def test_a_kill_in_the_middle_of_a_checkpoint_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its steps a copy of the directory opens with everything in it."""
    live = tmp_path / "live"
    live.mkdir()
    journal = Journal(live / "journal.db", SPACE)
    for number in range(4):
        accept_update(journal, _new(number), number)
    take_over = PageSums.take_over

    def copying(self: PageSums, frames: int) -> None:
        shutil.copytree(live, tmp_path / "copied")  # pages copied, sums not yet written
        take_over(self, frames)
        shutil.copytree(live, tmp_path / "summed")  # sums written, log not yet emptied

    monkeypatch.setattr(PageSums, "take_over", copying)
    journal.checkpoint()
    monkeypatch.undo()
    journal.close()
    for name in ("copied", "summed"):
        later = Journal(tmp_path / name / "journal.db", SPACE)
        assert len(list_updates(later, 0, 10)) == 4
        later.close()
