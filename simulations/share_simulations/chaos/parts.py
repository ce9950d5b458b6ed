"""One campaign in several processes side by side: each takes a part with a seed of its own, the counts are added up."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from share_core.errors import ConfigError

_SEED_STEP = 1_000_003
_TAKE_FIRST = frozenset({"campaign", "seed", "machine"})
_TAKE_MOST = frozenset({"slowest_s"})
_RECOUNTED = frozenset({"ok", "seconds"})

Run = Callable[[int, int, bool], dict[str, Any]]
"""(experiments, seed, whether to plant bugs) -> report."""


def run_in_parts(run: Run, experiments: int, seed: int, mutants: bool, jobs: int) -> dict[str, Any]:
    """Run a campaign in ``jobs`` processes and return one report; the first of them also plants the bugs.

    Raises:
        ConfigError: a part of it failed; its own message is on standard error.
    """
    jobs = min(jobs, experiments)
    if jobs == 1:
        return run(experiments, seed, mutants)
    began = time.monotonic()
    parts = []
    for number in range(jobs):
        share = experiments // jobs + (number < experiments % jobs)
        parts.append(_start(run, share, seed + number * _SEED_STEP, mutants and number == 0))
    reports = [_finish(*part) for part in parts]
    if None in reports:
        raise ConfigError(f"{reports.count(None)} of {jobs} parts of the campaign failed: see above, or use --jobs 1")
    whole = _together([report for report in reports if report is not None])
    whole["ok"] = all(report is not None and report["ok"] for report in reports)
    whole["seconds"] = round(time.monotonic() - began, 1)
    return whole


def _start(run: Run, share: int, seed: int, mutants: bool) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    code = 1
    try:
        os.close(read)
        report = run(share, seed, mutants)
        with os.fdopen(write, "w") as pipe:
            json.dump(report, pipe)
        code = 0
    except BaseException as error:
        os.write(2, f"share-sim: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _finish(pid: int, read: int) -> dict[str, Any] | None:
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if status == 0 else None


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
