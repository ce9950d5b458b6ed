"""The tracer, the kills before system calls, and the checks: each shown to notice what it is for."""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from share_core.errors import ConfigError
from share_simulations.chaos.checks import counted
from share_simulations.chaos.lab import Lab
from share_simulations.chaos.mutants import Mutant, mutants_of
from share_simulations.chaos.parts import run_in_parts
from share_simulations.chaos.ptrace import GO, KILL, Call, Ending, Handler, Verdict, require_tracer, trace
from share_simulations.chaos.scenario import Promised
from share_simulations.chaos.syscalls import SyscallOptions, hunt, place, run_syscalls, shoot, trial
from share_simulations.cli import app


class _Log(Handler):
    """Writes everything down and decides by name and path."""

    wants_data = True

    def __init__(self, verdicts: dict[tuple[str, str], Verdict] | None = None) -> None:
        self.calls: list[Call] = []
        self.results: list[tuple[str, int]] = []
        self.marks: list[bytes] = []
        self._verdicts = verdicts or {}

    def entered(self, call: Call) -> Verdict:
        self.calls.append(call)
        return self._verdicts.get((call.name, Path(call.path).name), GO)

    def left(self, call: Call, result: int) -> None:
        self.results.append((call.name, result))

    def marked(self, text: bytes) -> None:
        self.marks.append(text)


def _write(path: Path) -> int:
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    os.write(file, b"abc")
    os.pwrite(file, b"zz", 10)
    os.write(file, b"d")
    os.fsync(file)
    os.ftruncate(file, 5)
    os.close(file)
    path.rename(path.with_name("y"))
    path.with_name("y").unlink()
    return 0


def test_tracer_sees_the_calls_of_every_thread_with_data_and_results(tmp_path: Path) -> None:
    root = tmp_path / "seen"
    root.mkdir()

    def main() -> int:
        (tmp_path / "unseen").write_bytes(b"x")
        thread = threading.Thread(target=_write, args=(root / "x",))
        thread.start()
        thread.join()
        return 7

    log = _Log()
    assert trace(main, root, log) == Ending(7)
    assert [(c.name, Path(c.path).name, c.position, c.size, c.data) for c in log.calls] == [
        ("openat", "x", 0, 0, b""),
        ("write", "x", 0, 3, b"abc"),
        ("pwrite64", "x", 10, 2, b"zz"),
        ("write", "x", 3, 1, b"d"),
        ("fsync", "x", 0, 0, b""),
        ("ftruncate", "x", 0, 5, b""),
        ("rename", "x", 0, 0, b""),
        ("unlink", "y", 0, 0, b""),
    ]
    assert log.calls[6].target == str(root / "y")
    assert [result for name, result in log.results if "write" in name] == [3, 2, 1]
    assert (tmp_path / "unseen").read_bytes() == b"x"


def test_a_call_fails_with_the_chosen_error_without_running(tmp_path: Path) -> None:
    def main() -> int:
        try:
            (tmp_path / "bad").mkdir()
        except OSError as error:
            return error.errno or 0
        return 0

    assert trace(main, tmp_path, _Log({("mkdir", "bad"): Verdict(error=28)})) == Ending(28)
    assert not (tmp_path / "bad").exists()


def test_a_write_can_be_cut_short(tmp_path: Path) -> None:
    def main() -> int:
        file = os.open(tmp_path / "short", os.O_CREAT | os.O_WRONLY)
        return os.write(file, b"12345")

    assert trace(main, tmp_path, _Log({("write", "short"): Verdict(short=2)})) == Ending(2)
    assert (tmp_path / "short").read_bytes() == b"12"


def test_the_process_is_killed_before_the_call_runs(tmp_path: Path) -> None:
    log = _Log({("rename", "x"): KILL})
    assert trace(lambda: _write(tmp_path / "x"), tmp_path, log) == Ending(-1, signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert log.calls[-1].name == "rename"


def test_marks_are_shown_apart_from_the_calls(tmp_path: Path) -> None:
    marker = os.open(os.devnull, os.O_WRONLY)
    log = _Log()
    try:
        assert trace(lambda: os.write(marker, b"ack 1 2\n"), tmp_path, log, marker=marker) == Ending(8)
    finally:
        os.close(marker)
    assert (log.marks, log.calls) == ([b"ack 1 2\n"], [])


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    def main() -> int:
        time.sleep(600)
        return 0

    assert trace(main, tmp_path, _Log(), limit_s=1) == Ending(-1, signal.SIGALRM)


def test_other_machines_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match="Linux x86-64 only, this is linux aarch64"):
        require_tracer()


def test_a_life_covers_submit_merge_publish_and_collect(lab: Lab) -> None:
    start = lab.starts[1]
    places = {place(call) for call in trial(lab, start, lab.plan(start, 3))}
    assert {
        "write store/staging/*",
        "rename store/staging/*",
        "fsync store/blobs/*",
        "fdatasync store/journal.db-wal",
        "fdatasync store/anchor",
        "unlink store/blobs/*",
        "rename store/.tmp-journal.sums",
    } <= places


def test_nothing_is_lost_at_a_sample_of_kill_points() -> None:
    report = run_syscalls(SyscallOptions(points=21, seed=4))
    assert report["ok"], report["problems"]
    assert (report["points"], report["kills"], report["lives"]) == (21, 21, 3)
    assert report["acks"] > 0


@pytest.mark.parametrize("mutant", mutants_of("syscalls"), ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(lab: Lab, mutant: Mutant) -> None:
    caught = hunt(lab, mutant, seed=1)
    assert caught.after, f"{mutant.name} survived: {mutant.what}"


def test_the_checks_notice_what_was_promised_and_is_not_there(lab: Lab) -> None:
    start = lab.starts[1]
    plan = lab.plan(start, 8)
    shot = shoot(lab, start, plan, 40)
    assert shot.killed
    assert not shot.findings
    known, sha256 = next(iter(start.promised.acks.items()))
    promised = Promised({known: "0" * 64, "f" * 32: sha256}, version=99)
    kinds = [finding.kind for finding in lab.recover(plan, promised)]
    assert sorted(kinds) == ["lost", "lost", "unpublished"]
    other = Promised({}, start.promised.version, "0" * 64)
    lab.put_back(start)
    assert [finding.kind for finding in lab.recover(plan, other)] == ["unpublished"]


def test_the_checks_notice_a_missing_payload(lab: Lab) -> None:
    start = lab.starts[1]
    lab.put_back(start)
    digest = start.letters[0].sha256
    (lab.work / "store" / "blobs" / digest[:2] / digest).unlink()
    (finding,) = lab.recover(lab.plan(start, 8), start.promised)
    assert finding.kind == "unopenable"


def test_the_chain_is_counted_independently_of_the_rows() -> None:
    twice = [{"updates": ["a" * 32]}, {"updates": ["a" * 32]}]
    findings = list(counted([], twice, head=2))
    assert [finding.kind for finding in findings] == ["double", "gaps"]


def _counting(experiments: int, seed: int, mutants: bool) -> dict[str, Any]:
    if seed > 5 and experiments == 1:
        raise ConfigError("this part fails")
    return {"campaign": "syscalls", "seed": seed, "points": experiments, "mutants": int(mutants), "ok": seed != 6} | {
        "complete": True,
        "places": {"here": experiments},
        "problems": [f"seed {seed}"],
        "slowest_s": float(experiments),
    }


def test_parts_are_added_up() -> None:
    whole = run_in_parts(_counting, 5, 4, mutants=True, jobs=2)
    assert whole.pop("seconds") >= 0
    assert whole == {
        "campaign": "syscalls",
        "seed": 4,
        "points": 5,
        "mutants": 1,
        "complete": True,
        "ok": True,
        "places": {"here": 5},
        "problems": ["seed 4", "seed 1000007"],
        "slowest_s": 3.0,
    }


def test_a_broken_part_breaks_the_whole_and_a_failed_one_ends_it() -> None:
    assert not run_in_parts(_counting, 4, 6, mutants=False, jobs=2)["ok"]
    with pytest.raises(ConfigError, match="1 of 2 parts of the campaign failed"):
        run_in_parts(_counting, 3, 4, mutants=False, jobs=2)


def test_the_command_ends_with_one_json_object() -> None:
    result = CliRunner().invoke(app, ["chaos", "syscalls", "--points", "3", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert {key: report[key] for key in ("points", "kills", "lost", "double", "dangling", "unopenable")} == {
        "points": 3,
        "kills": 3,
        "lost": 0,
        "double": 0,
        "dangling": 0,
        "unopenable": 0,
    }


def test_a_surviving_bug_ends_the_command_with_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "share_simulations.chaos.syscalls.run_syscalls", lambda _: {"campaign": "syscalls", "ok": False}
    )
    assert CliRunner().invoke(app, ["chaos", "syscalls", "--json"]).exit_code == 1
