"""A disk that refuses: no acknowledgement after it, the hub ends, and comes back whole."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from share_simulations.chaos import disk
from share_simulations.chaos.disk import DiskOptions, FailAt, fail, faults_of, hunt, run_disk
from share_simulations.chaos.lab import Lab, Start, Witness
from share_simulations.chaos.mutants import Mutant, mutants_of
from share_simulations.chaos.ptrace import GO, Call, Verdict
from share_simulations.chaos.scenario import Plan, Promised
from share_simulations.chaos.syscalls import trial


def test_every_promise_holds_at_a_sample_of_failures() -> None:
    report = run_disk(DiskOptions(points=30, seed=2))
    assert report["ok"], report["problems"]
    assert report["points"] == 30
    assert report["noticed"] > 0
    assert set(report["faults"]) <= {"EIO", "ENOSPC", "EDQUOT", "short", "full"}


def test_every_means_each_call_of_a_life_from_each_start(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lives: dict[str, list[Call]] = {}

    def recorded(lab: Lab, start: Start, plan: Plan) -> list[Call]:
        return lives.setdefault(start.name, trial(lab, start, plan))

    monkeypatch.setattr(disk, "trial", recorded)
    chosen = list(disk.every_call(lab, 6))
    for start in lab.starts:
        of_start = [(number, fault) for begun, _, number, fault in chosen if begun is start]
        calls = lives[start.name]
        assert [number for number, fault in of_start if fault == "EIO"] == list(range(1, len(calls) + 1))
        room = [at for at, call in enumerate(calls, 1) if "ENOSPC" in faults_of(call)]
        assert [number for number, fault in of_start if fault == "ENOSPC"] == room
        assert len(calls) > 300


@pytest.mark.parametrize("where", ["fsync /staging/u-", "fdatasync /journal.db-wal", "fdatasync /anchor"])
def test_a_failed_flush_ends_the_hub_without_an_ack(lab: Lab, where: str) -> None:
    name, part = where.split(" ")
    start = lab.starts[1]
    plan = lab.plan(start, 6, orderly=True)
    calls = trial(lab, start, plan)
    begun = next(at for at, call in enumerate(calls) if "/staging/u-" in call.path)
    number = next(at for at, call in enumerate(calls[begun:], begun + 1) if call.name == name and part in call.path)
    handler, ending, findings = fail(lab, start, plan, number, "EIO")
    assert handler.failed is not None
    assert (handler.failed.name, findings, ending.code) == (name, [], 1)
    assert handler.promised.failed
    assert handler.promised.acks == start.promised.acks


@pytest.mark.parametrize(
    ("name", "part", "fault"),
    [("rename", r"\.tmp-journal.*", "EIO"), ("pwrite64", r"journal\.db", "ENOSPC"), ("pwrite64", "anchor", "short")],
)
def test_the_last_failure_of_a_life_leaves_a_store_that_opens(lab: Lab, name: str, part: str, fault: str) -> None:
    """The last checkpoint is made while the hub closes, when SQLite would copy what the page sums do not know."""
    start = lab.starts[1]
    plan = lab.plan(start, 6, orderly=True)
    for _ in range(5):  # two lives of one plan may differ by a call: then nothing has failed, and it is tried again
        fits = [call for call in trial(lab, start, plan) if _fits(call, name, part)]
        lab.put_back(start)
        handler = _FailLast(start.promised.copy(), name, part, len(fits), fault)
        lab.run(plan, handler)
        if handler.seen >= len(fits):
            break
    assert handler.seen >= len(fits)
    assert lab.recover(plan, handler.promised) == []


def _fits(call: Call, name: str, part: str) -> bool:
    return call.name == name and re.fullmatch(part, Path(call.path).name) is not None


class _FailLast(Witness):
    """Fails the last call of one kind, whatever the threads do in between."""

    def __init__(self, promised: Promised, name: str, part: str, count: int, fault: str) -> None:
        super().__init__(promised)
        self.seen = 0
        self._fits = (name, part)
        self._count = count
        self._verdict = Verdict(short=100) if fault == "short" else Verdict(error=getattr(errno, fault))

    def entered(self, call: Call) -> Verdict:
        if not _fits(call, *self._fits):
            return GO
        self.seen += 1
        return self._verdict if self.seen == self._count else GO


def test_an_ack_is_late_unless_its_row_was_flushed_before_the_failure(tmp_path: Path) -> None:
    log = tmp_path / "journal.db-wal"
    log.write_bytes(b"row " + b"a" * 32)
    handler = FailAt(Promised(), 2, "EIO")
    assert handler.entered(Call(1, "fdatasync", str(log))) == GO
    log.write_bytes(b"row " + b"a" * 32 + b" row " + b"b" * 32)
    assert handler.entered(Call(1, "fdatasync", str(log))).error == errno.EIO
    handler.marked(b"ack %b 0\nack %b 1\n" % (b"a" * 32, b"b" * 32))
    assert handler.late() == ["b" * 32]


def test_a_full_disk_stays_full() -> None:
    handler = FailAt(Promised(), 1, "full")
    verdicts = [handler.entered(Call(1, name, "/x/y")) for name in ("write", "fsync", "pwrite64", "unlink")]
    assert [verdict.error for verdict in verdicts] == [errno.ENOSPC, 0, errno.ENOSPC, 0]


def test_every_call_fails_in_the_ways_that_fit_it() -> None:
    assert faults_of(Call(1, "fsync", "/x")) == ("EIO",)
    assert faults_of(Call(1, "write", "/x")) == ("EIO", "ENOSPC", "full", "EDQUOT", "short")


@pytest.mark.parametrize("mutant", mutants_of("disk"), ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(lab: Lab, mutant: Mutant) -> None:
    caught = hunt(lab, mutant, seed=1)
    assert caught.after, f"{mutant.name} survived: {mutant.what}"
