"""A disk that refuses: every file-changing call of a hub's life fails, once or for good, in every way that fits it.

What must hold: no update is acknowledged after the failure unless its row was durable before it; the hub notices, says
so and ends; and the next start on a healthy disk keeps every promise.
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_simulations.chaos.checks import Finding
from share_simulations.chaos.lab import Lab, Start, Witness, open_lab, seeds
from share_simulations.chaos.mutants import Mutant, mutants_of
from share_simulations.chaos.ptrace import GO, Call, Ending, Verdict
from share_simulations.chaos.report import Caught, Tally, assemble
from share_simulations.chaos.scenario import Plan, Promised
from share_simulations.chaos.show import Meter
from share_simulations.chaos.syscalls import place, trial
from share_simulations.interrupts import reporting

_MUTANT_POINTS = 400
_SHORT = "short"
"""A write takes only a part, which is no failure: the hub must write the rest."""
_FULL = "full"
"""This call and all later ones that need room fail with ENOSPC."""
_UPDATE_ID = re.compile(rb"[0-9a-f]{32}")
_WRITES = frozenset({"write", "pwrite64"})
_FLUSHES = frozenset({"fsync", "fdatasync"})
_NEEDS_ROOM = _WRITES | {"openat", "mkdir", "rename", "fallocate", "ftruncate"}


@dataclass(frozen=True)
class DiskOptions:
    """One campaign."""

    points: int = 3_000
    """Failures in all; not used with ``every``."""
    seed: int = 0
    """Of the workloads."""
    mutants: bool = False
    """Also show that the planted bugs are caught."""
    folder: Path | None = None
    """Where the stores lie; default: memory."""
    every: bool = False
    """Instead of a sample: each call of one orderly life from each start, with EIO and, if it needs room, ENOSPC."""


class FailAt(Witness):
    """Lets the n-th file-changing call fail, and remembers what was durable at that moment."""

    def __init__(self, promised: Promised, number: int, fault: str) -> None:
        super().__init__(promised)
        self._number, self._fault = number, fault
        self._calls = 0
        self._durable: set[bytes] = set()
        self.failed: Call | None = None
        self.at_failure: Promised | None = None
        """What had been promised when the call failed."""

    def entered(self, call: Call) -> Verdict:
        """Fail the chosen call; before it, follow which rows the journal has flushed."""
        self._calls += 1
        if self.failed is not None:
            full = self._fault == _FULL and call.name in _NEEDS_ROOM
            return Verdict(error=errno.ENOSPC) if full else GO
        if self._calls == self._number:
            self.failed, self.at_failure = call, self.promised.copy()
            if self._fault == _SHORT:
                return Verdict(short=max(1, call.size // 2)) if call.name in _WRITES and call.size > 1 else GO
            return Verdict(error=errno.ENOSPC if self._fault == _FULL else int(getattr(errno, self._fault)))
        if call.name in _FLUSHES and call.path.endswith("journal.db-wal"):
            # This flush is not the one that fails, so what it flushes may be acknowledged, whatever fails later.
            self._durable |= set(_UPDATE_ID.findall(Path(call.path).read_bytes()))
        return GO

    def late(self) -> list[str]:
        """Return the updates that were acknowledged after the failure and whose rows were not flushed before it."""
        if self.at_failure is None or self._fault == _SHORT:
            return []
        after = self.promised.acks.keys() - self.at_failure.acks.keys()
        return sorted(name for name in after if name.encode() not in self._durable)


def run_disk(options: DiskOptions) -> dict[str, Any]:
    """Run the campaign and return its report.

    Raises:
        ConfigError: this machine cannot trace, or the hub does not even work without a fault.
        Interrupted: with the report of what was reached.
    """
    began = time.monotonic()
    tally, faults, places, caught = Tally(), Counter[str](), Counter[str](), list[Caught]()
    acks = noticed = shorter = 0

    def report() -> dict[str, Any]:
        figures = {
            "points": faults.total(),
            "shorter": shorter,
            "acks": acks,
            "noticed": noticed,
            "faults": dict(faults.most_common()),
            "places": dict(places.most_common()),
        }
        return assemble("disk", options.seed, figures, tally, caught, began)

    with reporting(report), open_lab(options.folder) as lab:
        every = list(every_call(lab, options.seed)) if options.every else None
        points = options.points if every is None else len(every)
        with Meter("disk failures", points) as meter:
            for start, plan, number, fault in every or experiments(lab, options.seed, points):
                handler, ending, findings = fail(lab, start, plan, number, fault)
                if handler.failed is None:
                    shorter += 1  # this life was shorter than the one that was counted
                    continue
                tally.add(findings, f"start {start.name}, call {number}, {fault} at {place(handler.failed)}")
                faults[fault] += 1
                places[place(handler.failed)] += 1
                acks += len(handler.promised.acks) - len(start.promised.acks)
                noticed += ending.code == 1
                meter.step(f"{acks} acknowledged, {tally.broken} broken")
                if faults.total() >= points:
                    break
        for mutant in mutants_of("disk") if options.mutants else ():
            caught.append(hunt(lab, mutant, options.seed))
    return report()


Experiment = tuple[Start, Plan, int, str]
"""(start, plan, call number, fault)."""


def every_call(lab: Lab, seed: int) -> Iterator[Experiment]:
    """Yield each file-changing call of one life from each start, updates one at a time, with EIO and with ENOSPC."""
    for start in lab.starts:
        plan = lab.plan(start, next(iter(seeds(seed))), orderly=True)
        for number, call in enumerate(trial(lab, start, plan), 1):
            for fault in faults_of(call):
                if fault in ("EIO", "ENOSPC"):
                    yield start, plan, number, fault


def experiments(lab: Lab, seed: int, points: int, near: str = "") -> Iterator[Experiment]:
    """Yield experiments for ever: every start in turn, one at a time and all at once in turn.

    Of each life a random part is taken; with ``near`` the calls at such a place come first.
    """
    share = max(1, -(-points // (2 * len(lab.starts))))
    for workload in seeds(seed):
        for orderly in (False, True):
            for start in lab.starts:
                plan = lab.plan(start, workload, orderly=orderly)
                calls = trial(lab, start, plan)
                chosen = [(at, fault) for at, call in enumerate(calls, 1) for fault in faults_of(call)]
                if len(chosen) > share:
                    chosen = random.Random(workload).sample(chosen, len(chosen) if near else share)
                    chosen.sort(key=lambda one: not place(calls[one[0] - 1]).startswith(near))
                for number, fault in chosen[:share]:
                    yield start, plan, number, fault


def faults_of(call: Call) -> tuple[str, ...]:
    """Return the ways in which a call can fail."""
    return (
        "EIO",
        *(("ENOSPC", _FULL) if call.name in _NEEDS_ROOM else ()),
        *(("EDQUOT", _SHORT) if call.name in _WRITES else ()),
    )


def fail(
    lab: Lab, start: Start, plan: Plan, number: int, fault: str, mutant: Mutant | None = None
) -> tuple[FailAt, Ending, list[Finding]]:
    """Let one call of one hub fail and check what came of it."""
    lab.put_back(start)
    handler = FailAt(start.promised.copy(), number, fault)
    ending = lab.run(plan, handler, mutant)
    findings = lab.recover(plan, handler.promised)
    call = handler.failed
    if call is None or handler.at_failure is None:
        return handler, ending, findings
    if passed_over(call):
        return handler, ending, findings
    findings += [
        Finding("late", f"update {name} was acknowledged after the storage had failed") for name in handler.late()
    ]
    if ending.code not in (0, 1):
        findings.append(Finding("hung", f"the hub ended with {ending}"))
    elif ending.code == 0 and not (fault == _SHORT or handler.at_failure.closing):
        findings.append(Finding("unnoticed", f"the hub went on after {fault} at {place(call)}"))
    return handler, ending, findings


def passed_over(call: Call) -> bool:
    """Return whether SQLite passes over a failure of this call, and rightly so.

    SQLite flushes the directory after it has created a file, and ignores the answer. Nothing rests on that: the hub
    flushes the directory itself (``fsync``), and that call is among those that fail.
    """
    return call.name == "fdatasync" and Path(call.path).name == "store"


def hunt(lab: Lab, mutant: Mutant, seed: int) -> Caught:
    """Let calls of a hub with a planted bug fail, first where it should show, until a promise is broken."""
    tried = 0
    with Meter(f"planted bug {mutant.name}", _MUTANT_POINTS) as meter:
        for start, plan, number, fault in experiments(lab, seed, _MUTANT_POINTS, mutant.near):
            handler, _, findings = fail(lab, start, plan, number, fault, mutant)
            tried += 1
            meter.step()
            if findings and handler.failed is not None:
                return Caught(mutant.name, mutant.what, tried, findings[0].text)
            if tried >= _MUTANT_POINTS:
                break
    return Caught(mutant.name, mutant.what, 0, "")
