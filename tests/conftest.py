"""Settings for every test, the order in which workers take them, and Python programs in processes of their own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
from collections.abc import Callable

import pytest
import torch

# Two test workers on two cores: threads inside a test would only fight each other, and one thread is deterministic.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too

# A shell lets what it starts in the background ignore SIGINT, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "server/fleet/test_federation.py",
    "simulations/bench/test_bench.py",
    "simulations/test_federation.py",
    "simulations/chaos/",
    "simulations/bench/",
    "server/fleet/",
    "server/operations/",
    "core/space_tool/",
)
"""Where tests take longest. They come first, so that no worker has a long one left when the other has none.

The first, third, ... file goes to the same worker: the two federations of many processes do not run side by side.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""

    def place(item: pytest.Item) -> int:
        return next((at for at, path in enumerate(LONGEST) if item.nodeid.startswith(f"tests/{path}")), len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Take everything that was imported out of the collector's sight: it stays, and looking at it takes long."""
    gc.collect()
    gc.freeze()


# As with LocalHub: forked from a server that has imported everything, because importing takes longer than the rest.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["share_server.hub.__main__"])

PROGRAM = """
import os, sys, torch
for number, path in ((1, {output!r}), (2, {errors!r})):
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(file, number)
    os.close(file)
torch.set_num_threads(1)
sys.argv = {words!r}
"""


@pytest.fixture(scope="session")
def run_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function (Python program, arguments) that runs it in a process of its own and waits for its end."""

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("program")
        script, output, errors = folder / "program.py", folder / "output", folder / "errors"
        words = ["program", *map(str, arguments)]
        script.write_text(PROGRAM.format(output=str(output), errors=str(errors), words=words) + program)
        process = WARM.Process(target=runpy.run_path, args=(str(script),), kwargs={"run_name": "__main__"})
        process.start()
        process.join(240)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{words} did not end: {errors.read_text()}")
        return subprocess.CompletedProcess(words, process.exitcode, output.read_text(), errors.read_text())

    return run
