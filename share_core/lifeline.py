"""Processes that die with the process that started them.

Flower starts workers of workers, some in sessions of their own, so a signal to a process group does not reach
all of them. On Linux the kernel does the work: ``PR_SET_PDEATHSIG`` kills a child when the *thread* that
forked it ends, and ``PR_SET_CHILD_SUBREAPER`` makes orphaned descendants children of a supervisor, which can
then kill and reap them. Two consequences for callers:

* fork tied children from the main thread, or from a thread that lives as long as the process;
* the tie is not inherited by grandchildren: each of our modules that Flower loads calls :func:`arm` itself.

Elsewhere :func:`arm` polls the parent's id from a thread, which :func:`tied` cannot take across its exec, and
:func:`become_subreaper` does nothing and says so by its result. Reaping matters because Flower's own watchers take a
zombie for a living process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Container, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.5


def _load_prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def call(option: int, argument: int) -> int:
        return int(libc.prctl(option, ctypes.c_ulong(argument), *(ctypes.c_ulong(0),) * 3))

    return call


_PRCTL = _load_prctl()


def arm(parent: int | None = None) -> None:
    """Have this process killed when its parent ends. Calling it again is harmless.

    ``parent`` is the process id that must be alive, where the caller knows it. It closes the gap between fork
    and this call: if another process is the parent by now, this process ends at once.
    """
    expected = os.getppid() if parent is None else parent
    if _PRCTL is None:
        threading.Thread(target=_poll_parent, args=(expected,), name="lifeline", daemon=True).start()
        return
    if _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def tied(command: Sequence[str]) -> list[str]:
    """Return ``command`` wrapped so that it arms itself before it becomes the program; the process id stays.

    No Python code runs between fork and exec, so no lock that another thread (gRPC's, for one) held at the fork can
    stop the child. Call it in the process that forks. The program must be a path, or on the PATH of the child's
    environment.
    """
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *command]


def become_subreaper() -> bool:
    """Make this process the parent of its orphaned descendants. Return False where the system cannot."""
    return _PRCTL is not None and _PRCTL(_PR_SET_CHILD_SUBREAPER, 1) == 0


def kill_adopted(keep: Container[int]) -> list[int]:
    """Kill and reap every child of this process whose id is not in ``keep``; return their ids.

    For a subreaper, after the death of a child that may have left workers behind. ``keep`` names the children
    that are somebody's ``Popen``, which must reap them itself. Repeats until none is left, because killing a
    worker hands its own children to this process.
    """
    ended: list[int] = []
    while found := [pid for pid in children() if pid not in keep]:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        ended.extend(found)
    return ended


def children(parent: int | None = None) -> list[int]:
    """Return the ids of the direct children of ``parent`` (default: this process), zombies included.

    Read from ``/proc``; empty on a system without it.
    """
    wanted = os.getpid() if parent is None else parent
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _parent_of(entry) == wanted]


def _parent_of(entry: Path) -> int | None:
    try:
        stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # ended while we were looking
        return None
    # The command in parentheses may itself hold spaces and parentheses; the fields follow the last one.
    return int(stat.rpartition(")")[2].split()[1])


def _poll_parent(parent: int) -> None:
    pause = threading.Event()
    while os.getppid() == parent:
        pause.wait(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    arm(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
