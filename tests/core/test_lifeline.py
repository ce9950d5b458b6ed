"""The kernel ends what a dead parent leaves behind; a control group shows that a survivor would be seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")

SLEEPER = "import time; time.sleep(60)"
ARMED = "from share_core import lifeline; lifeline.arm(); " + SLEEPER
PARENT = """
import subprocess, sys, time
from share_core import lifeline
mode, child = sys.argv[1], sys.argv[2]
command = [sys.executable, "-c", child]
process = subprocess.Popen(lifeline.tied(command) if mode == "tied" else command)
time.sleep(0.7)
print(process.pid, flush=True)
time.sleep(60)
"""


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("mode", "child", "survives"),
    [("tied", SLEEPER, False), ("plain", ARMED, False), ("plain", SLEEPER, True)],
    ids=["tied", "armed-itself", "planted-bug-no-tie"],
)
def test_child_of_a_killed_parent(mode: str, child: str, survives: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, mode, child], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    try:
        # A survivor is given the time in which the others are seen to die many times over.
        gone = wait_until(lambda: not alive(pid), 1.0 if survives else 10.0)
        assert gone is not survives
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_parent_that_is_already_gone_ends_the_process() -> None:
    code = "from share_core import lifeline; lifeline.arm(parent=1 << 22); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == ""


SUBREAPER = """
import os, subprocess, sys, time
from share_core import lifeline
if sys.argv[1] == "subreaper":
    assert lifeline.become_subreaper()
nowhere = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
kept = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **nowhere)
middle = subprocess.Popen([sys.executable, "-c",
    "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"],
    stdout=subprocess.PIPE, text=True)
orphan = int(middle.communicate()[0])
ended = lifeline.kill_adopted(keep={kept.pid})
print(orphan, orphan in ended, kept.poll() is None, flush=True)
kept.kill()
kept.wait()
"""


@pytest.mark.parametrize("mode", ["subreaper", "planted-bug-no-subreaper"])
def test_orphans_in_their_own_session_are_ended_and_the_kept_child_is_not(mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBREAPER, mode], capture_output=True, text=True, check=True, timeout=60
    )
    orphan, ended, kept = done.stdout.split()
    try:
        assert kept == "True"
        assert (ended == "True") is (mode == "subreaper")
        assert alive(int(orphan)) is (mode != "subreaper")
    finally:
        if alive(int(orphan)):
            os.kill(int(orphan), signal.SIGKILL)
