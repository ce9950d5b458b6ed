"""One supervised process: found dead, started again with growing pauses, killed when it never works."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from share_server.fleet import service
from share_server.fleet.service import Service


def make(tmp_path: Path, code: str, probe: Callable[[], bool], start_limit: float = 60.0) -> Service:
    return Service("child", tmp_path / "child.log", lambda: ([sys.executable, "-c", code], None), probe, start_limit)


def step_until(child: Service, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        child.step()
        time.sleep(0.01)


def test_it_is_started_again_with_growing_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_PAUSES", (0.0, 0.0, 3600.0))
    child = make(tmp_path, "import sys; print('my reason'); sys.exit(3)", lambda: False)
    step_until(child, lambda: child.deaths == 3)
    assert child.exit_code == 3
    assert not child.was_healthy
    child.step()
    assert child.pid is None, "the third pause is an hour"
    assert child.tail().count("my reason") == 3


def test_a_steady_life_makes_the_next_death_a_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_STEADY_SECONDS", 0.0)
    child = make(tmp_path, "import time; time.sleep(0.3)", lambda: True)
    step_until(child, lambda: child.healthy)
    step_until(child, lambda: not child.healthy)
    step_until(child, lambda: child.healthy)
    step_until(child, lambda: not child.healthy)
    assert child.deaths == 1


def test_one_that_never_works_is_killed(tmp_path: Path) -> None:
    child = make(tmp_path, "import time; time.sleep(60)", lambda: False, start_limit=0.2)
    step_until(child, lambda: child.deaths == 1)
    assert child.exit_code == -9


@pytest.mark.parametrize(
    ("code", "ready", "patience"),
    [
        ("import time; print('up', flush=True); time.sleep(60)", "up", 30.0),
        (
            "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
            "up",
            0.3,
        ),
    ],
    ids=["obedient", "deaf"],
)
def test_stopping_always_ends_it(tmp_path: Path, code: str, ready: str, patience: float) -> None:
    child = make(tmp_path, code, lambda: True)
    step_until(child, lambda: ready in child.tail())
    pid = child.pid
    assert pid is not None
    child.ask_to_stop()
    child.stop(patience)
    assert child.pid is None
    assert not Path(f"/proc/{pid}").exists()


def test_a_log_that_its_process_lets_grow_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("share_server.hub.log.FILE_BYTES", 1000)
    code = "import time\nwhile True:\n    print('x' * 99, flush=True)\n    time.sleep(0.02)"
    child = make(tmp_path, code, lambda: True)
    aside, path = tmp_path / "child.log.1", tmp_path / "child.log"
    step_until(child, aside.exists)
    first = aside.stat().st_mtime_ns
    step_until(child, lambda: aside.stat().st_mtime_ns != first)
    child.ask_to_stop()
    child.stop(30.0)
    assert 2000 < aside.stat().st_size < 20_000
    assert path.stat().st_size < 20_000
    assert set(path.read_text()) <= {"x", "\n"}  # no hole: the process appends
