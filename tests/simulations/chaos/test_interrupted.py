"""A campaign that is interrupted ends its processes, and its last line is what it has reached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from share_core.lifeline import children
from share_simulations.chaos.bitflip import BitflipOptions, run_bitflip
from share_simulations.chaos.disk import DiskOptions, run_disk
from share_simulations.chaos.parts import run_in_parts
from share_simulations.chaos.power import PowerOptions, run_power
from share_simulations.chaos.ptrace import run_child
from share_simulations.chaos.show import Meter
from share_simulations.chaos.syscalls import SyscallOptions, run_syscalls
from share_simulations.interrupts import Interrupted, interruptible, reporting

_PATIENCE_S = 90.0


def _blobs(folder: Path) -> bool:
    """Whether a hub below ``folder`` has stored payloads."""
    return sum(1 for _ in folder.glob("*/server/store/blobs/*/*")) > 20


class _Experiments:
    """Whether each of two laboratories has made some experiments, which begin with a folder that is made anew."""

    def __init__(self) -> None:
        self._made: dict[str, set[int]] = defaultdict(set)

    def __call__(self, folder: Path) -> bool:
        for lab in folder.iterdir():
            with suppress(FileNotFoundError):
                if (lab / "killed").exists():  # before it, the laboratory is being built
                    self._made[lab.name].add((lab / "work").stat().st_ctime_ns)
        return [len(moments) > 6 for moments in self._made.values()] == [True, True]


def _clients(folder: Path) -> bool:
    """Whether two clients of the day work and one has a receipt: another may train for long, on purpose."""
    ledgers = [path.read_bytes() for path in folder.glob("*/*.ledger")]
    return len(ledgers) >= 2 and any(b"receipt" in ledger for ledger in ledgers)


@pytest.mark.parametrize(
    ("command", "under_way", "number", "reached"),
    [
        (["kill", "--clients", "24", "--mutants"], _blobs, signal.SIGTERM, "acks"),
        (["network"], lambda folder: bool(list(folder.glob("*/server/store/blobs/*/*"))), signal.SIGINT, "updates"),
        (["day", "--clients", "4"], _clients, signal.SIGTERM, "acknowledged"),
        (["syscalls", "--jobs", "2"], _Experiments(), signal.SIGTERM, "points"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_interrupt_leaves_no_process_no_file_and_a_report(
    command: list[str], under_way: Callable[[Path], bool], number: signal.Signals, reached: str, tmp_path: Path
) -> None:
    program = str(Path(sys.executable).parent / "share-sim")
    with (
        (tmp_path / "said").open("w+") as said,
        subprocess.Popen(
            [program, "chaos", *command, "--json", "--dir", str(_made(tmp_path / "lab"))],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            process_group=0,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            end = time.monotonic() + _PATIENCE_S
            while not under_way(tmp_path / "lab"):
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
            time.sleep(1.0)
            started = _descendants(process.pid)
            assert started
            process.send_signal(number)
            process.send_signal(number)  # as GNU timeout does
            output = process.stdout.read()
            code = process.wait(_PATIENCE_S)
        finally:
            if process.poll() is None:  # nobody waits for the end of a campaign that this test gives up
                os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    assert code == 130, text
    report = json.loads(output.splitlines()[-1])
    assert (report["campaign"], report["complete"], report["ok"]) == (command[0], False, False)
    assert report[reached] > 0
    assert report["problems"] == [], "an interrupt is no broken promise"
    assert "interrupted" in text
    assert "Traceback" not in text
    assert list((tmp_path / "lab").iterdir()) == []
    end = time.monotonic() + 30
    while any(_runs(pid) for pid in started) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in started if _runs(pid)]


@pytest.mark.parametrize(
    ("run", "count"),
    [
        (lambda: run_syscalls(SyscallOptions(points=50)), "points"),
        (lambda: run_disk(DiskOptions(points=50)), "points"),
        (lambda: run_power(PowerOptions(cuts=50)), "cuts"),
        (lambda: run_bitflip(BitflipOptions(flips=50)), "flips"),
    ],
    ids=["syscalls", "disk", "power", "bitflip"],
)
def test_every_laboratory_reports_the_experiments_before_the_interrupt(
    run: Callable[[], dict[str, Any]], count: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(3))

    def step(meter: Meter, text: str = "") -> None:
        if next(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Meter, "step", step)
    with pytest.raises(Interrupted) as caught:
        run()
    report = caught.value.report
    assert (report[count], report["lost"], report["complete"], report["ok"]) == (3, 0, False, False)


def _endless(experiments: int, seed: int, mutants: bool) -> dict[str, Any]:
    """Reach one experiment and go on for ever."""
    with reporting(lambda: {"campaign": "syscalls", "seed": seed, "points": 1, "problems": []}):
        time.sleep(600)
    raise AssertionError("it was not interrupted")


def test_parts_side_by_side_are_interrupted_and_added_up() -> None:
    before, report = set(children()), dict[str, Any]()
    with _interrupt_after(1.5), pytest.raises(typer.Exit), interruptible("all is stopped"):
        try:
            run_in_parts(_endless, 4, 1, mutants=False, jobs=2)
        except Interrupted as interrupt:
            report = interrupt.report
            raise
    assert report.pop("seconds") < 60
    assert report == {"campaign": "syscalls", "seed": 1, "points": 2, "problems": [], "complete": False, "ok": False}
    assert set(children()) == before


def test_a_child_does_not_outlive_an_interrupt_of_the_wait_for_it(tmp_path: Path) -> None:
    def main() -> int:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)
        return 0

    with _interrupt_after(1.5), pytest.raises(typer.Exit), interruptible("all is stopped"):
        run_child(main)
    assert not _runs(int((tmp_path / "pid").read_text()))


def test_a_meter_counts_and_says_where_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("flips", 3) as meter:
        meter.step("fine")
        meter.step("fine")
        meter.note("half")
    assert capsys.readouterr().err.splitlines() == ["flips: half", "flips: 2 of 3 in 0 s"]


@contextmanager
def _interrupt_after(seconds: float) -> Iterator[None]:
    """Send SIGTERM to this process from another one: a thread would be in the way of forks."""
    with subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -TERM {os.getpid()}"]):
        yield


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _descendants(pid: int) -> list[int]:
    direct = children(pid)
    return direct + [below for child in direct for below in _descendants(child)]


def _runs(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
