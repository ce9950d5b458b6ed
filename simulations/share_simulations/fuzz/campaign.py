"""``share-sim fuzz``: many executions of the target, guided by coverage, that can be interrupted and go on later.

Each process of libFuzzer makes a slice of the executions and ends; the count and the corpus are kept in a folder
between slices and between runs. The count begins anew when the reader has changed, the corpus does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from share_core import tensorfile, wire
from share_core.durable import write_atomic
from share_core.errors import ConfigError
from share_core.lifeline import tied
from share_simulations.chaos.show import Meter
from share_simulations.fuzz.mutator import blind, mutate, seeds
from share_simulations.fuzz.planted import GUARDS
from share_simulations.interrupts import reporting

FINDABLE = (
    "minus zero",
    "nesting",
    "metadata strings",
    "metadata ascii",
    "dtype allowed",
    "dtype a string",
    "shape of whole numbers",
    "offsets of whole numbers",
    "size of the shape",
    "numbers not bools",
    "contiguous",
    "to the end",
    "finite halves",
    "norm of an update",
)
"""Guards whose absence shows by itself. That others are missing only shows by what is accepted: ``tests/attacks``."""

_LONGEST_FILE = 4096
_HANG_S = 20
"""A file that takes longer than this, in seconds of a busy machine, is a hang."""
_MUTANT_RUNS = 100_000


@dataclass(frozen=True)
class FuzzOptions:
    """One campaign."""

    runs: int = 10_000_000
    """Executions in all, those of earlier runs on the same folder included."""
    jobs: int = 1
    """Processes side by side."""
    folder: Path | None = None
    """Where corpus and count are kept; None: nowhere."""
    seeds: tuple[Path, ...] = ()
    """Folders of files to begin with, beside the ones that are made."""
    slice: int = 50_000
    """Executions of one process."""
    seed: int = 0
    """Of the mutations."""
    mutants: bool = False
    """Also show that a missing guard is found."""


@dataclass
class _Count:
    """What is kept between runs."""

    reader: str
    """SHA-256 of the sources of the reader."""
    executions: int = 0
    seconds: float = 0.0
    """Added up over processes."""
    coverage: int = 0
    """Edges of the reader that were reached."""
    slowest_s: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    """Files by how they ended; the last few of each process are not in it."""
    found: list[str] = field(default_factory=list)
    """Broken rules."""


@dataclass
class _Slice:
    """One running process."""

    process: subprocess.Popen[bytes]
    log: Path
    tally: Path
    prefix: Path


def run_fuzz(options: FuzzOptions) -> dict[str, Any]:
    """Run the campaign and return its report; its key ``ok`` says whether no rule was broken and every bug found.

    Raises:
        ConfigError: atheris is not installed.
        Interrupted: with the report of what was reached.
    """
    if importlib.util.find_spec("atheris") is None:
        raise ConfigError("share-sim fuzz needs atheris: install fedshare[fuzz]")
    caught: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="fedshare-fuzz-") as scratch:
        folder = options.folder or Path(scratch)
        count = _load(folder)

        def report() -> dict[str, Any]:
            return _report(options, folder, count, caught)

        with reporting(report), Meter("fuzz") as meter:
            _prepare(folder)
            _all_slices(options, folder, count, meter)
            for guard in FINDABLE if options.mutants else ():
                caught[guard] = hunt(guard, options)
                meter.note(f"without {guard}: {caught[guard] or 'NOT FOUND'}")
            return report()


def run_blindly(look: Callable[[bytes], str], runs: int, seed: int) -> str:
    """Give ``look`` so many changed files without guidance; return the first broken rule, or nothing.

    Equal arguments give equal files: for a short look where there is no atheris.
    """
    draw = random.Random(seed)
    raw = blind(draw)
    for _ in range(runs):
        data = draw.choice(seeds())
        for _ in range(draw.choice((1, 1, 2, 3))):
            data = mutate(data, draw, raw)
        try:
            look(data)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def hunt(guard: str, options: FuzzOptions) -> str:
    """Return what a short guided run finds in a reader without this guard; nothing if it does not."""
    with tempfile.TemporaryDirectory(prefix="fedshare-fuzz-") as scratch:
        folder, count = Path(scratch), _Count("")
        _prepare(folder)
        one = _start(options, folder, _MUTANT_RUNS, options.seed, guard)
        try:
            _end(one, count)
        finally:
            one.process.kill()
            one.process.wait()
        return count.found[0] if count.found else ""


def _prepare(folder: Path) -> None:
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for data in seeds():
        (folder / "corpus" / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)


def _all_slices(options: FuzzOptions, folder: Path, count: _Count, meter: Meter) -> None:
    running: list[_Slice] = []
    begun = count.executions
    try:
        while (begun < options.runs and not count.found) or running:
            while begun < options.runs and not count.found and len(running) < options.jobs:
                runs = min(options.slice, options.runs - begun)
                # Every slice has mutations of its own, also after an interruption.
                running.append(_start(options, folder, runs, options.seed * 1_000_003 + begun + 1))
                begun += runs
            meter.show(f"{count.executions:,} of {options.runs:,} executions, {count.coverage} edges")
            time.sleep(0.2)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _end(one, count)
                write_atomic(folder / "count.json", json.dumps(vars(count)).encode())
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()


def _start(options: FuzzOptions, folder: Path, runs: int, seed: int, guard: str = "") -> _Slice:
    name = f"slice-{seed}"
    log, tally, prefix = folder / f"{name}.log", folder / f"{name}.json", folder / f"{name}-found-"
    command = [sys.executable, "-m", "share_simulations.fuzz.worker", str(tally), guard, str(folder / "corpus")]
    command += [str(path) for path in options.seeds]
    command += [f"-runs={runs}", f"-seed={seed % 2**32 or 1}", f"-max_len={_LONGEST_FILE}", f"-timeout={_HANG_S}"]
    command += [f"-artifact_prefix={prefix}", "-print_final_stats=1", "-reduce_inputs=0", "-rss_limit_mb=2048"]
    with log.open("wb") as out:
        process = subprocess.Popen(tied(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    return _Slice(process, log, tally, prefix)


def _end(one: _Slice, count: _Count) -> None:
    """Wait for a process and add what it has done; its log is removed unless it has found something."""
    code = one.process.wait()
    text = one.log.read_text(errors="replace")
    count.executions += _last(r"number_of_executed_units:\s+(\d+)", text)
    count.coverage = max(count.coverage, _last(r" cov: (\d+)", text))
    count.slowest_s = max(count.slowest_s, _last(r"slowest_unit_time_sec:\s+(\d+)", text))
    count.seconds += _last(r"Done \d+ runs in (\d+) second", text)
    with contextlib.suppress(OSError, ValueError):
        count.ends.update(json.loads(one.tally.read_text()))
    one.tally.unlink(missing_ok=True)
    if code == 0:
        one.log.unlink()
    else:
        count.found.append(_reason(text, code))


def _reason(text: str, code: int) -> str:
    """Return the exception or the complaint of libFuzzer in the log of a process that found something."""
    for pattern in (r"=== Uncaught Python exception: ===\s+([^\n]+)", r"(ERROR: libFuzzer: [^\n]+)"):
        if found := re.search(pattern, text):
            return found[1][:300]
    return f"the process ended with code {code}: {text[-300:]}"


def _last(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def _load(folder: Path) -> _Count:
    reader = hashlib.sha256(b"".join(Path(str(m.__file__)).read_bytes() for m in (tensorfile, wire))).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads((folder / "count.json").read_text())
        if kept.get("reader") == reader:
            return _Count(**{**kept, "ends": Counter(kept["ends"])})
    return _Count(reader)


def _report(options: FuzzOptions, folder: Path, count: _Count, caught: dict[str, str]) -> dict[str, Any]:
    surviving = [guard for guard, sign in caught.items() if not sign]
    return {
        "campaign": "fuzz",
        "executions": count.executions,
        "asked": options.runs,
        "broken_rules": len(count.found),
        "problems": count.found[:20],
        "ends": dict(count.ends.most_common()),
        "coverage_edges": count.coverage,
        "corpus_files": len(_files(folder / "corpus")),
        "slowest_s": count.slowest_s,
        "process_seconds": round(count.seconds, 1),
        "mutants": len(caught),
        "mutants_caught": len(caught) - len(surviving),
        "mutants_by_name": caught,
        "surviving": surviving,
        "reader_sha256": count.reader,
        "guards": len(GUARDS),
        "libraries": f"safetensors {safetensors.__version__}, Python {platform.python_version()}",
        "complete": count.executions >= options.runs,
        "ok": not count.found and not surviving and count.executions >= options.runs,
    }


def _files(folder: Path) -> Sequence[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
