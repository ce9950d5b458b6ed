"""One campaign in several processes side by side: each takes a part with a seed of its own, the counts are added up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

from share_core.errors import ConfigError
from share_core.lifeline import arm
from share_simulations.interrupts import Interrupted, reporting

_SEED_STEP = 1_000_003
_TAKE_FIRST = frozenset({"campaign", "seed", "machine"})
_TAKE_MOST = frozenset({"slowest_s"})
_ALL = ("complete", "ok")
_RECOUNTED = frozenset({*_ALL, "seconds"})

Run = Callable[[int, int, bool], dict[str, Any]]
"""(experiments, seed, whether to plant bugs) -> report."""


@dataclass
class _Part:
    """One process of a campaign."""

    pid: int
    """Process id, which is also the id of its process group."""
    answer: IO[bytes]
    """A file without a name into which it writes its report as JSON."""
    status: int | None = None
    """How it ended, as ``waitpid`` says it."""


def run_in_parts(run: Run, experiments: int, seed: int, mutants: bool, jobs: int) -> dict[str, Any]:
    """Run a campaign in ``jobs`` processes and return one report; the first of them also plants the bugs.

    Raises:
        ConfigError: a part of it failed; its own message is on standard error.
        Interrupted: with what all parts have reached.
    """
    jobs = min(jobs, experiments)
    if jobs == 1:
        return run(experiments, seed, mutants)
    began = time.monotonic()
    parts: list[_Part] = []
    with ExitStack() as stack:

        def report() -> dict[str, Any]:
            """Interrupt the parts and add up what they say."""
            for part in parts:
                if part.status is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(part.pid, signal.SIGTERM)
            _wait(parts)
            return _whole([_report_of(part) for part in parts], began)

        with reporting(report):
            for number in range(jobs):
                share = experiments // jobs + (number < experiments % jobs)
                answer = stack.enter_context(tempfile.TemporaryFile())
                parts.append(_start(run, share, seed + number * _SEED_STEP, mutants and number == 0, answer))
            _wait(parts)
        reports = [_report_of(part) for part in parts]
    if None in reports:
        raise ConfigError(f"{reports.count(None)} of {jobs} parts of the campaign failed: see above, or use --jobs 1")
    return _whole(reports, began)


def _start(run: Run, share: int, seed: int, mutants: bool, answer: IO[bytes]) -> _Part:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(PermissionError):  # it has done this itself
            os.setpgid(pid, pid)
        return _Part(pid, answer)
    code = 1
    try:
        arm(parent)
        os.setpgid(0, 0)  # Ctrl-C is for the parent, which interrupts its parts
        try:
            report = run(share, seed, mutants)
        except Interrupted as interrupt:
            report = interrupt.report
        answer.write(json.dumps(report).encode())
        answer.flush()
        code = 0
    except BaseException as error:
        os.write(2, f"share-sim: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _wait(parts: list[_Part]) -> None:
    for part in parts:
        if part.status is None:
            part.status = os.waitpid(part.pid, 0)[1]


def _report_of(part: _Part) -> dict[str, Any] | None:
    """Return what a part that has ended reported; None if it failed."""
    if part.status != 0:
        return None
    part.answer.seek(0)
    report: dict[str, Any] = json.loads(part.answer.read())
    return report


def _whole(reports: list[dict[str, Any] | None], began: float) -> dict[str, Any]:
    """Return one report of those parts that did not fail."""
    known = [report for report in reports if report is not None]
    whole = _together(known)
    for key in _ALL:
        whole[key] = all(report[key] for report in known)
    whole["seconds"] = round(time.monotonic() - began, 1)
    return whole


def _together(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up counts, at any depth."""
    found: dict[str, Any] = {}
    for report in reports:
        for key, value in report.items():
            if key in _RECOUNTED or (key in _TAKE_FIRST and key in found):
                continue
            if key not in found:
                found[key] = value
            elif isinstance(value, dict):
                found[key] = _together([found[key], value])
            elif key in _TAKE_MOST:
                found[key] = max(found[key], value)
            elif not isinstance(value, str):
                found[key] = found[key] + value
    return found
