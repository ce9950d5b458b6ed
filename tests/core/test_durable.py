"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from share_core import durable


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    durable.write_atomic(target, b"old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        durable.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_modes_are_as_asked(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        durable.write_atomic(tmp_path / "key", b"secret")
        durable.write_atomic(tmp_path / "certificate", b"for all", durable.PUBLIC)
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "certificate").stat().st_mode & 0o777 == 0o644


def test_every_byte_is_flushed_before_a_name_points_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unflushed_renames(tmp_path, monkeypatch) == []


def test_a_write_without_flush_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the file is renamed without having been flushed."""
    monkeypatch.setattr(durable, "write_flushed", lambda path, data, mode: path.write_bytes(data))
    assert unflushed_renames(tmp_path, monkeypatch) == ["file"]


def unflushed_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write one file; return the names it got before its bytes were flushed."""
    flushed: set[str] = set()
    early: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        real_fsync(handle)
        flushed.add(str(Path(f"/proc/self/fd/{handle}").readlink()))

    def rename(path: Path, target: Path) -> Path:
        if str(path) not in flushed:
            early.append(target.name)
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    durable.write_atomic(tmp_path / "file", b"data")
    assert str(tmp_path) in flushed, "the directory itself was not flushed"
    return early
