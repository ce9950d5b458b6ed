"""A whole simulation: federation, baselines, results, table and pictures."""

from __future__ import annotations

import os
import shutil
import time
from datetime import datetime
from pathlib import Path

from share_core.errors import ConfigError
from share_simulations.baselines import measure_baselines
from share_simulations.federation import RunFolders, run_federation
from share_simulations.plots import write_plots
from share_simulations.progress import Progress
from share_simulations.results import Results, summarise, write_results
from share_simulations.scenario import Scenario


def new_run_folder(scenario: str, out: Path | None, now: datetime) -> RunFolders:
    """Make an empty run folder: ``out``, or ``runs/<scenario>-<time>`` here.

    Raises:
        ConfigError: ``out`` exists and is not empty.
    """
    root = out if out is not None else Path("runs") / f"{scenario}-{now:%Y%m%d-%H%M%S}"
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{root}: expected a new or empty folder for the run; choose another with --out")
    root.mkdir(parents=True, exist_ok=True)
    return RunFolders(root.resolve())


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
    baselines = measure_baselines(scenario, folders.clients, progress.note, threads=os.cpu_count())
    took = time.monotonic() - started
    results = summarise(scenario, record.seen, baselines, record.seconds, took, folders.root)
    write_results(results, folders.root)
    write_plots(results, folders.root)
    if not keep:
        for folder in (folders.server, folders.clients):
            shutil.rmtree(folder)
    return results
