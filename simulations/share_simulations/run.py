"""A whole simulation: federation, baselines, results, table and pictures."""

from __future__ import annotations

import os
import shutil
import time
from datetime import datetime
from pathlib import Path

from share_core.errors import ConfigError
from share_simulations.baselines.separate_lora import measure_baselines
from share_simulations.federation import RunFolders, run_federation
from share_simulations.plots import CURVES_FILE, MATRIX_FILE, write_plots
from share_simulations.progress import Progress
from share_simulations.results import FILE, Results, summarise, write_results
from share_simulations.scenario import Scenario

RUN_ENTRIES = frozenset({"server", "clients", "logs", FILE, MATRIX_FILE, CURVES_FILE})
"""Everything that a run leaves in its folder."""


def new_run_folder(scenario: str, out: Path | None, now: datetime) -> RunFolders:
    """Make an empty run folder: ``out``, or ``runs/<scenario>-<time>`` here. An earlier run in ``out`` is replaced.

    Raises:
        ConfigError: ``out`` holds anything else than an earlier run, or one that still runs.
    """
    root = out if out is not None else Path("runs") / f"{scenario}-{now:%Y%m%d-%H%M%S}"
    if root.exists():
        _clear(root)
    root.mkdir(parents=True, exist_ok=True)
    return RunFolders(root.resolve())


def _clear(root: Path) -> None:
    """Remove an earlier run. Nothing that share-sim did not make is ever touched."""
    if not root.is_dir():
        raise ConfigError(f"{root}: expected a new or empty folder or an earlier run, but it is a file")
    found = {p.name for p in root.iterdir()}
    if not found <= RUN_ENTRIES:
        strange = ", ".join(sorted(found - RUN_ENTRIES)[:3])
        raise ConfigError(f"{root}: expected a new or empty folder or an earlier run, but it holds {strange}")
    if (RunFolders(root).server / "run.json").exists():
        raise ConfigError(f"{root}: a federation still runs here; choose another folder with --out")
    for path in root.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def simulate(scenario: Scenario, folders: RunFolders, progress: Progress, keep: bool = False) -> Results:
    """Run ``scenario``, measure the baselines and write results and pictures into the run folder.

    Unless ``keep``, the keys, data and store of a finished federation are removed; results and logs stay. After a
    failure everything stays.

    Raises:
        FedshareError: the federation failed.
    """
    record = run_federation(scenario, folders, progress)
    progress.note(f"federation done after {record.seconds:.0f} s; measuring each task alone")
    started = time.monotonic()
    baselines = measure_baselines(scenario, folders.clients, progress.note, scenario.baseline_threads or os.cpu_count())
    took = time.monotonic() - started
    results = summarise(scenario, record.seen, baselines, record.seconds, took, folders.root)
    write_results(results, folders.root)
    write_plots(results, folders.root)
    if not keep:
        for folder in (folders.server, folders.clients):
            shutil.rmtree(folder)
    return results
