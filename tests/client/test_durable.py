"""JSON lines that survive a torn write, and stay private."""

from __future__ import annotations

from pathlib import Path

from share_client import durable


def test_a_log_is_private(tmp_path: Path) -> None:
    durable.append_line(tmp_path / "log", "line")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_line_after_a_torn_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    durable.append_line(path, '{"n": 1}')
    with path.open("ab") as file:
        file.write(b'{"n": 2, "torn')
    durable.append_line(path, '{"n": 3}')
    assert [line["n"] for line in durable.read_json_lines(path)] == [1, 3]
