"""The result of one simulated federation: everything measured, as one value that is stored as ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from share_core.errors import ConfigError
from share_simulations import metrics
from share_simulations.baselines.separate_lora import LORA_RANK, Baseline
from share_simulations.metrics import AccuracyMatrix
from share_simulations.scenario import Scenario
from share_simulations.watch import Observation

FILE = "results.json"


@dataclass(frozen=True)
class TaskResult:
    """One task at the end."""

    task: str
    owner: str
    rows: int
    """Training rows."""
    test_rows: int
    classes: int
    accuracy_frozen: float | None
    accuracy_lora: float | None
    accuracy_own: float | None
    """Right after the task's own last merge."""
    accuracy_final: float | None
    """At the newest version."""
    forgetting: float | None
    updates: int
    first_version: int
    last_version: int
    """Version of the task's own last merge."""
    relative_error: float
    """What the last merge left of the update, as the hub measured it."""
    bytes_up: int


@dataclass(frozen=True)
class Results:
    """One run. Accuracies are fractions, bytes are payload bytes, None is what was not measured."""

    scenario: str
    backbone: str
    seed: int
    dtype: str
    clients: int
    tasks: int
    average_accuracy: float | None
    lora_average_accuracy: float | None
    frozen_average_accuracy: float | None
    forgetting: float | None
    """Accuracy after the own last merge minus final accuracy, mean over all tasks."""
    bwt: float | None
    """The same with the sign turned, over the tasks that something was merged after."""
    bytes_up: int
    bytes_up_lora: int
    bytes_heads: int
    bytes_envelope: int
    bytes_down: int
    bytes_total: int
    updates: int
    versions: int
    staleness_max: int
    staleness_mean: float
    staleness: Mapping[str, int]
    """Number of merged updates by staleness."""
    k_left: int
    k_right: int
    k_max: int
    tau: float
    compactions: int
    subspace_bytes: int
    seconds: float
    """The federation, from the start of the server to the last evaluation."""
    seconds_baselines: float
    run_dir: str
    per_task: tuple[TaskResult, ...]
    """In the order of the tasks' last merges."""
    matrix: AccuracyMatrix
    """Every version by every task."""

    @property
    def task_matrix(self) -> AccuracyMatrix:
        """The T x T matrix: one row after each task's own last merge."""
        return metrics.task_matrix(self.matrix, {t.task: t.last_version for t in self.per_task})


def summarise(
    scenario: Scenario,
    seen: Observation,
    baselines: Mapping[str, Baseline],
    seconds: float,
    seconds_baselines: float,
    run_dir: Path,
) -> Results:
    """Compute the results from the hub's last records and the baselines (which may lack tasks)."""
    submissions = seen.submissions
    last = metrics.last_merges(submissions)
    order = [*last, *(t for t in scenario.task_ids if t not in last)]
    matrix = metrics.accuracy_matrix(seen.measured, order, seen.version)
    own, final = metrics.own_accuracy(matrix, last), metrics.final_accuracy(matrix)
    forgetting = metrics.forgetting_per_task(own, final)
    traffic = metrics.traffic(submissions, seen.down_bytes, seen.sites, LORA_RANK, scenario.dtype, seen.down_heads)
    stale = [s.staleness for s in submissions if s.staleness is not None]
    results = [baselines.get(t) for t in order]
    return Results(
        scenario=scenario.name,
        backbone=scenario.backbone,
        seed=scenario.seed,
        dtype=scenario.dtype,
        clients=len(scenario.clients),
        tasks=len(order),
        average_accuracy=metrics.mean(final.values()),
        lora_average_accuracy=metrics.mean(b.lora if b else None for b in results),
        frozen_average_accuracy=metrics.mean(b.frozen if b else None for b in results),
        forgetting=metrics.mean(forgetting.values()),
        bwt=metrics.backward_transfer(own, final, last, seen.version),
        bytes_up=traffic.up,
        bytes_up_lora=traffic.up_lora,
        bytes_heads=traffic.heads,
        bytes_envelope=traffic.envelope,
        bytes_down=traffic.down,
        bytes_total=traffic.total,
        updates=len(submissions),
        versions=seen.version,
        staleness_max=max(stale, default=0),
        staleness_mean=sum(stale) / len(stale) if stale else 0.0,
        staleness={str(k): v for k, v in metrics.staleness_histogram(submissions).items()},
        k_left=seen.k_left,
        k_right=seen.k_right,
        k_max=seen.k_max,
        tau=seen.tau,
        compactions=seen.compactions,
        subspace_bytes=seen.subspace_bytes,
        seconds=seconds,
        seconds_baselines=seconds_baselines,
        run_dir=str(run_dir),
        per_task=tuple(_task_result(t, scenario, seen, baselines.get(t), own.get(t), final.get(t)) for t in order),
        matrix=matrix,
    )


def _task_result(
    task: str,
    scenario: Scenario,
    seen: Observation,
    alone: Baseline | None,
    own: float | None,
    final: float | None,
) -> TaskResult:
    mine = [s for s in seen.submissions if s.task == task]
    merged = [s for s in mine if s.version]
    test_rows = max((m.rows for m in seen.measured if m.task == task), default=0)
    return TaskResult(
        task=task,
        owner=scenario.owners[task].member,
        rows=alone.rows if alone else 0,
        test_rows=alone.test_rows if alone else test_rows,
        classes=alone.classes if alone else 0,
        accuracy_frozen=alone.frozen if alone else None,
        accuracy_lora=alone.lora if alone else None,
        accuracy_own=own,
        accuracy_final=final,
        forgetting=None if own is None or final is None else own - final,
        updates=len(mine),
        first_version=min((s.version for s in merged), default=0),
        last_version=max((s.version for s in merged), default=0),
        relative_error=merged[-1].relative_error if merged else 0.0,
        bytes_up=sum(s.coefficients + s.directions for s in mine),
    )


def as_json(results: Results) -> dict[str, Any]:
    """Return the results as plain JSON values."""
    return asdict(results)


def write_results(results: Results, folder: Path) -> Path:
    """Write ``results.json`` into ``folder`` and return its path."""
    path = folder / FILE
    path.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")
    return path


def read_results(folder: Path) -> Results:
    """Read the results of an earlier run.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    path = folder / FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["per_task"] = tuple(TaskResult(**t) for t in fields["per_task"])
        fields["matrix"] = _matrix(**fields["matrix"])
        return Results(**fields)
    except OSError as error:
        raise ConfigError(f"{path}: expected the results of a finished run: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not the results of this version of share-sim: {error}") from error


def _matrix(tasks: Sequence[str], versions: Sequence[int], values: Sequence[Sequence[float | None]]) -> AccuracyMatrix:
    return AccuracyMatrix(tuple(tasks), tuple(versions), tuple(tuple(row) for row in values))
