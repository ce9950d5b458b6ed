"""JSON lines that survive a torn write, and stay private."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from share_client import durable
from share_client.egress import EgressLog, read_egress
from share_client.spending import Spending
from share_core.errors import StorageError
from share_core.privacy import CoefficientNoise


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


@contextmanager
def room_for(path: Path, count: int) -> Iterator[None]:
    """Let no file grow beyond the size of ``path`` and ``count`` bytes: the system then takes a part of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_does_not_fit_is_an_error_and_no_half_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    durable.append_line(path, '{"n": 1}')
    with room_for(path, 5), pytest.raises(OSError, match="too large"):
        durable.append_line(path, '{"n": 2}')
    durable.append_line(path, '{"n": 3}')
    assert [line["n"] for line in durable.read_json_lines(path)] == [1, 3]


def test_nothing_is_sent_on_a_line_of_which_only_a_part_was_written(tmp_path: Path) -> None:
    log = EgressLog(tmp_path)
    log.record("call", "hub", 10)
    path = tmp_path / "00000001.jsonl"
    with room_for(path, 40), pytest.raises(StorageError, match="nothing is sent without it"):
        log.record("call", "hub", 20)
    log.record("call", "hub", 30)
    assert [line.count(b'"number":') for line in read_egress(tmp_path)] == [1, 1]


def test_no_epsilon_is_spent_on_a_line_of_which_only_a_part_was_written(tmp_path: Path) -> None:
    spending = Spending(tmp_path)
    declared = CoefficientNoise(clip=1.0, noise_multiplier=2.0, delta=1e-5)
    first = spending.add("task", declared)
    with room_for(tmp_path / "task" / "spent.jsonl", 40), pytest.raises(OSError, match="too large"):
        spending.add("task", declared)
    assert spending.total("task") == first
