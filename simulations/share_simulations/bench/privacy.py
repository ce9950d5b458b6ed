"""What privacy costs: accuracy against epsilon on real text, for both mechanisms of :mod:`share_core.privacy`.

A space is first learned from other tasks, without noise. Then each task is trained in it

* by plain training and by DP-SGD at every epsilon (each row is hidden), cores, free directions and head;
* by training coefficients only, then clipping them and adding the noise of every epsilon (each contributor is hidden),
  averaged over some contributors. They are copies of one, so this is the best case: only their noise differs.

Beside them stands the frozen backbone with a trained head, which sends nothing at all. The same rows serve every run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from share_client.kinds import Rows
from share_client.noise import system_normal
from share_client.privacy_table import PrivacyConfig
from share_client.tasks_file import TaskConfig
from share_client.training import (
    Backbone,
    PreparedTask,
    TrainingOptions,
    declare,
    evaluate,
    load_backbone,
    prepare_task,
    train_in_space,
    train_lora,
)
from share_client.training.batches import sorted_batches
from share_client.training.factors import FixedFactors
from share_client.training.inject import adapted, injected
from share_client.training.loop import adamw, fresh_head, triangle
from share_client.training.options import DEFAULT_RATE
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.merge import MergePolicy, empty_state, merge
from share_core.privacy import CoefficientNoise, noisy_cores
from share_core.space import update_adapter
from share_core.types import SiteUpdate, Space, Update
from share_simulations.text import choose_rows, read_lines

Note = Callable[[str], None]


@dataclass(frozen=True)
class PrivacyOptions:
    """What is measured."""

    data: Path
    """Folder of text tasks, ``<task>/{train,test}.jsonl[.gz]``."""
    out: Path
    """Folder that ``privacy.json`` and ``privacy.png`` are written to."""
    tasks: tuple[str, ...] = ("sst2", "trec")
    """Tasks to train privately."""
    others: tuple[str, ...] = ("snips", "subj")
    """Tasks that the space is learned from, without privacy."""
    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """What one training may spend."""
    contributors: tuple[int, ...] = (1, 200)
    """Members whose noisy coefficients are averaged."""
    rows: int = 2000
    """Training rows of a task."""
    test_rows: int = 1000
    """Most test rows of a task."""
    epochs: int = 5
    """Passes over the rows, also of plain training."""
    batch_size: int = 100
    """Rows in a step; expected rows with DP-SGD."""
    max_length: int = 32
    """Longest text in tokens."""
    clip: float = 1.0
    """Norm to which coefficients are clipped."""
    seeds: int = 3
    """Repetitions: seeds of rows' order and starts; the noise is new in each."""


@dataclass(frozen=True)
class _Bench:
    backbone: Backbone
    space: Space
    options: PrivacyOptions
    note: Note


def run_privacy(
    options: PrivacyOptions, note: Note, beside: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Measure, write ``privacy.json`` and ``privacy.png``, and return the report; ``beside`` are figures to add to it.

    Raises:
        ConfigError: data or packages are missing.
    """
    if options.seeds < 1 or not options.tasks or not options.epsilons:
        raise ConfigError("bench privacy: expected at least one task, one epsilon and one seed")
    options.out.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone("minilm", "auto")
    bench = _Bench(backbone, _learned(backbone, options, note), options, note)
    report: dict[str, Any] = {
        **beside,
        "rows": options.rows,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "seeds": options.seeds,
        "clip": options.clip,
        "max_length": options.max_length,
        "coefficients": sum(basis.k_out * basis.k_in for basis in bench.space.bases.values()),
        "tasks": {},
    }
    for name in options.tasks:
        report["tasks"][name] = _task(bench, name)
        (options.out / "privacy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    from share_simulations.bench.privacy_plot import write_privacy_plot

    write_privacy_plot(report, options.out / "privacy.png")
    return report


def _learned(backbone: Backbone, options: PrivacyOptions, note: Note) -> Space:
    """Return a space that the other tasks were merged into."""
    state = empty_state(describe_space("minilm", backbone.site_weights()))
    for name in options.others:
        task = _prepared(backbone, options, name)
        made = train_in_space(backbone, task, state.space, f"bench/{name}", _training(options, 0))
        adapter = update_adapter(made.update, state.space.bases)
        state = merge(state, f"bench/{name}", adapter, MergePolicy(tau=0.05)).state
        note(f"space: {name} merged, loss {made.loss:.3f}, {made.seconds:.0f} s")
    return state.space


def _prepared(backbone: Backbone, options: PrivacyOptions, name: str) -> PreparedTask:
    folder = options.out / "rows" / name
    folder.mkdir(parents=True, exist_ok=True)
    for part, limit in (("train", options.rows), ("test", options.test_rows)):
        lines = choose_rows(read_lines(options.data / name, part), limit, f"privacy/{name}/{part}")
        (folder / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    config = TaskConfig(
        name=name,
        kind="text-classification",
        train=folder / "train.jsonl",
        test=folder / "test.jsonl",
        epochs=options.epochs,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )
    return prepare_task(config, backbone)


def _training(options: PrivacyOptions, seed: int) -> TrainingOptions:
    return TrainingOptions(epochs=options.epochs, batch_size=options.batch_size, seed=seed)


def _task(bench: _Bench, name: str) -> dict[str, Any]:
    """Return every figure of one task: means over the seeds, with the least and the largest."""
    task = _prepared(bench.backbone, bench.options, name)
    found: dict[str, list[float]] = {}
    noise: dict[str, float] = {}
    for seed in range(bench.options.seeds):
        for key, value in {**_samples(bench, task, seed, noise), **_coefficients(bench, task, seed, noise)}.items():
            found.setdefault(key, []).append(value)
            bench.note(f"{name}, seed {seed}: {key}: {value:.4f}")
    accuracy = {key: {"mean": fmean(values), "min": min(values), "max": max(values)} for key, values in found.items()}
    return {"test_rows": task.test_rows, "train_rows": task.train_rows, "accuracy": accuracy, "noise_multiplier": noise}


def _samples(bench: _Bench, task: PreparedTask, seed: int, noise: dict[str, float]) -> dict[str, float]:
    """Train with the head alone, without noise, and by DP-SGD at every epsilon."""
    backbone, options = bench.backbone, _training(bench.options, seed)
    bare = train_lora(backbone, task, 0, options)
    found = {"frozen backbone, plain head": evaluate(backbone, task, None, bare.head).value}
    for epsilon in (math.inf, *bench.options.epsilons):
        key = f"dp-sgd, epsilon {epsilon:g}"
        privacy = None if math.isinf(epsilon) else PrivacyConfig(epsilon=epsilon)
        declared = declare(replace(task.config, privacy=privacy), task.train_rows)
        made = train_in_space(backbone, task, bench.space, f"bench/{task.config.name}", options, declared=declared)
        found[key] = evaluate(backbone, task, update_adapter(made.update, bench.space.bases), made.head).value
        if declared is not None:
            noise[key] = declared.noise_multiplier
    return found


def _coefficients(bench: _Bench, task: PreparedTask, seed: int, noise: dict[str, float]) -> dict[str, float]:
    """Train coefficients once, then put the noise of every epsilon on them, averaged over the contributors."""
    backbone, options = bench.backbone, replace(_training(bench.options, seed), directions=0)
    made = train_in_space(backbone, task, bench.space, f"bench/{task.config.name}", options)
    cores = {site: part.core for site, part in made.update.sites.items() if part.core is not None}
    found = {"coefficients, epsilon inf": _with_head(bench, task, options, made.update.sites)}
    for epsilon in bench.options.epsilons:
        privacy = PrivacyConfig(mechanism="coefficients", epsilon=epsilon, clip=bench.options.clip)
        declared = declare(replace(task.config, privacy=privacy), task.train_rows)
        assert isinstance(declared, CoefficientNoise)
        for contributors in bench.options.contributors:
            key = f"coefficients, {contributors} contributors, epsilon {epsilon:g}"
            averaged = declared.noise_multiplier / math.sqrt(contributors)
            noisy = noisy_cores(
                cores, bench.space.bases, declared.clip, averaged, TrainingOptions.pseudo_rank, system_normal
            )
            found[key] = _with_head(bench, task, options, {site: SiteUpdate(core=core) for site, core in noisy.items()})
            noise[key] = declared.noise_multiplier
    return found


def _with_head(bench: _Bench, task: PreparedTask, options: TrainingOptions, sites: Mapping[str, SiteUpdate]) -> float:
    """Return the accuracy with a private head that is trained on what the noise left, as a client does.

    The backbone with the released change is fixed, so the features of every row are computed once.
    """
    backbone = bench.backbone
    adapter = update_adapter(Update(bench.space.version, sites), bench.space.bases)
    fixed = {
        site: adapted(backbone.site(site), FixedFactors(one.out.float(), one.in_.float()).to(backbone.device))
        for site, one in adapter.items()
    }
    with injected(backbone, fixed), torch.no_grad():
        train_x, train_y = _features(backbone, task.train)
        test_x, test_y = _features(backbone, task.test)
    head = fresh_head(backbone, task, options.seed, None)
    draw = torch.Generator().manual_seed(options.seed)
    steps = bench.options.epochs * -(-len(train_y) // options.batch_size)
    optimizer = adamw(head, backbone.width, (), options.learning_rate or DEFAULT_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, triangle(steps, options.warmup))
    for _ in range(bench.options.epochs):
        order = torch.randperm(len(train_y), generator=draw)
        for begin in range(0, len(order), options.batch_size):
            rows = order[begin : begin + options.batch_size]
            optimizer.zero_grad()
            task.kind.loss(head(train_x[rows]), train_y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return task.kind.score(task.kind.judge(head(test_x), test_y))


def _features(backbone: Backbone, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return features (rows, width) and targets (rows,) of a split, in one order."""
    parts = [rows.batch(chosen, backbone.device) for chosen in sorted_batches(rows, 128)]
    return torch.cat([backbone.features(inputs) for inputs, _ in parts]), torch.cat([targets for _, targets in parts])
