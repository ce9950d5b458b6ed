"""The tasks of a ``tasks.toml``, each alone: as a client trains them, against a separate LoRA and a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from share_client.tasks_file import TaskConfig, read_tasks
from share_client.training import (
    Backbone,
    EvaluationResult,
    TrainingOptions,
    evaluate,
    load_backbone,
    prepare_task,
    train_in_space,
    train_lora,
)
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.space import empty_space, update_adapter
from share_core.types import Space
from share_core.wire import decode_snapshot

Note = Callable[[str], None]

LORA_RANK = 8
WAYS = ("frozen", "lora", "fedshare")


@dataclass(frozen=True)
class TasksOptions:
    """What is measured."""

    path: Path
    """A tasks file."""
    seeds: int = 3
    """Each gives another start and order of rows."""
    snapshot: Path | None = None
    """A version of the space to train in; None: the empty space."""


def run_tasks(options: TasksOptions, note: Note) -> dict[str, Any]:
    """Train every task in each way with every seed, and return all figures.

    ``frozen`` is a head on the frozen backbone, ``lora`` a separate LoRA of rank 8 at the same sites, ``fedshare`` what
    a client does. All have the same rows, passes and rate. Noise is left out.

    Raises:
        ConfigError: a file cannot be used, or names no task.
    """
    file = read_tasks(options.path)
    if not file.tasks:
        raise ConfigError(f"{options.path}: expected a [[task]] to measure, got none: watched folders are left out")
    backbone = load_backbone(file.backbone, file.device)
    space = _space(backbone, options.snapshot)
    found: dict[str, dict[str, Any]] = {}
    for config in file.tasks:
        runs = []
        for seed in range(options.seeds):
            runs.append(_measured(backbone, replace(config, seed=seed), space))
            values = ", ".join(f"{way} {run.value:.4f}" for way, run in runs[-1].items())
            note(f"{config.name}, seed {seed}: {runs[-1][WAYS[0]].metric} {values}")
        found[config.name] = {"kind": config.kind, "test_rows": runs[0]["lora"].rows, "metrics": _means(runs)}
    return {"backbone": backbone.name, "version": space.version, "seeds": options.seeds, "tasks": found}


def _space(backbone: Backbone, snapshot: Path | None) -> Space:
    spec = describe_space(backbone.name, backbone.site_weights())
    if snapshot is None:
        return empty_space(spec)
    try:
        return decode_snapshot(snapshot.read_bytes(), spec)
    except OSError as error:
        raise ConfigError(f"{snapshot}: cannot read this version of the space: {error}") from error


def _measured(backbone: Backbone, config: TaskConfig, space: Space) -> dict[str, EvaluationResult]:
    task = prepare_task(config, backbone)
    training = TrainingOptions.of(config)
    made = {}
    for way, rank in (("frozen", 0), ("lora", LORA_RANK)):
        separate = train_lora(backbone, task, rank, training)
        made[way] = evaluate(backbone, task, separate.adapter, separate.head)
    ours = train_in_space(backbone, task, space, f"bench/{config.name}", training)
    made["fedshare"] = evaluate(backbone, task, update_adapter(ours.update, space.bases), ours.head)
    return made


def _means(runs: list[dict[str, EvaluationResult]]) -> dict[str, dict[str, Any]]:
    """Return for the metric and each detail, by way, the mean over seeds; ``by_seed`` has the metric's values."""
    first = runs[0][WAYS[0]]
    figures: dict[str, dict[str, Any]] = {
        first.metric: {way: fmean(run[way].value for run in runs) for way in WAYS}
        | {"by_seed": {way: [run[way].value for run in runs] for way in WAYS}}
    }
    for detail in first.details:
        figures[detail] = {way: fmean(run[way].details[detail] for run in runs) for way in WAYS}
    return figures


def tasks_table(report: Mapping[str, Any]) -> Table:
    """Return the means of a report of :func:`run_tasks`, one line a metric."""
    table = Table("task", "metric", "frozen", f"LoRA, rank {LORA_RANK}", "fedshare", "spread over seeds")
    for name, own in report["tasks"].items():
        for metric, figures in own["metrics"].items():
            values = figures.get("by_seed", {}).get("fedshare", [])
            spread = f"{min(values):.4f} to {max(values):.4f}" if values else ""
            table.add_row(name, metric, *(f"{figures[way]:.4f}" for way in WAYS), spread)
    return table
