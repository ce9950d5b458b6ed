"""Processes end together, whatever happens, and failures show the log."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from share_core.errors import ConfigError
from share_simulations import processes
from share_simulations.processes import Processes, ProcessFailedError, installed

STUBBORN = """#!{python}
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
away = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, away.pid, flush=True)
time.sleep(600)
"""
POLITE = """#!{python}
import signal, sys, time
def stop(*_):
    print("bye", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", sys.stdin.readline().strip(), flush=True)
time.sleep(600)
"""
FAILING = """#!{python}
import sys
for number in range(100):
    print("line", number)
print("the reason", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three commands that stand where the console scripts are."""
    for name, source in (("stubborn", STUBBORN), ("polite", POLITE), ("failing", FAILING)):
        path = tmp_path / name
        path.write_text(source.format(python=sys.executable), encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(processes, "installed", lambda command: str(tmp_path / command))


def wait_for(log: Path, word: str) -> str:
    deadline = time.monotonic() + 60
    while word not in (text := log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline, f"{word} not in {log}"
        time.sleep(0.02)
    return text


def alive(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.usefixtures("commands")
def test_a_child_gets_its_input_and_may_say_goodbye(tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as group:
        child = group.start("one", ["polite"], stdin="secret")
        wait_for(child.log, "ready secret")
        group.check()
    assert child.exit_code() == 0
    assert child.log.read_text(encoding="utf-8").endswith("bye\n")


@pytest.mark.usefixtures("commands")
def test_nothing_is_left_of_a_child_that_ignores_the_request(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Processes(tmp_path / "logs", patience_s=0.2) as group:
        child = group.start("one", ["stubborn"])
        grandchildren = [int(pid) for pid in wait_for(child.log, "\n").split()]
        raise ZeroDivisionError
    assert child.exit_code() == -signal.SIGKILL
    assert not any(alive(pid) for pid in (child.pid, *grandchildren))


@pytest.mark.usefixtures("commands")
def test_a_child_that_ends_by_itself_is_reported_with_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as group:
        child = group.start("one", ["failing"])
        wait_for(child.log, "the reason")
        while child.exit_code() is None:
            time.sleep(0.02)
        with pytest.raises(ProcessFailedError, match=r"one: ended with exit code 7 before") as caught:
            group.check()
    assert "the reason" in str(caught.value)
    assert "line 99" in str(caught.value)
    assert "line 3\n" not in str(caught.value), "only the end of the log"


@pytest.mark.usefixtures("commands")
def test_a_command_that_fails_is_reported_with_what_it_said(tmp_path: Path) -> None:
    with (
        Processes(tmp_path / "logs") as group,
        pytest.raises(ProcessFailedError, match=r"init: failing --x ended with exit code 7: the reason"),
    ):
        group.call("init", ["failing", "--x"])


@pytest.mark.usefixtures("commands")
def test_children_die_with_a_killed_simulation(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom share_simulations import processes\n"
        f"processes.installed = lambda c: {str(tmp_path)!r} + '/' + c\n"
        f"with processes.Processes(Path({str(tmp_path / 'logs')!r})) as group:\n"
        "    print(group.start('one', ['polite'], stdin='x').pid, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as simulation:
        assert simulation.stdout is not None
        pid = int(simulation.stdout.readline())
        assert alive(pid)
        simulation.kill()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_a_command_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="share-nothing"):
        installed("share-nothing")
