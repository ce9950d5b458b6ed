"""Twelve text tasks that arrive one after another at a few clients, against a separate LoRA for each.

For every seed the same rows serve every way of adapting: the defaults (``auto``), each fixed mode, separate LoRA, and
the frozen backbone with a trained head. A task is trained in the newest version, encoded as it would be sent, decoded,
and merged before the next one arrives; a delta goes to every client. Accuracies are on whole test sets, right after a
task's own merge and again at the end, with the same head. Ways and seeds are independent and run side by side; each is
kept in a file, so that an interrupted run goes on where it was, and a later one may add ways and seeds.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from share_client.training import (
    Backbone,
    PreparedTask,
    TrainingOptions,
    evaluate,
    load_backbone,
    train_in_space,
    train_lora,
)
from share_core.cold_start import backbone_bases
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.merge import HubState, MergePolicy, empty_state, merge
from share_core.space import task_adapter, update_adapter
from share_core.types import Adapter, Factors, Space, SpaceSpec
from share_core.wire import decode_update, encode_adapter, encode_delta, encode_snapshot, encode_update, payload_bytes
from share_simulations.bench.parts import Parts
from share_simulations.bench.sequence_report import summary
from share_simulations.bench.texts import text_task

Note = Callable[[str], None]

LORA_RANK = 8
TASKS = (
    "trec",
    "sst2",
    "clinc150",
    "subj",
    "tweet_emotion",
    "snips",
    "cr",
    "banking77",
    "tweet_offensive",
    "tweet_emoji",
    "qqp",
    "tweet_hate",
)
"""Default order of arrival: kinds of task alternate; long texts are left to the other benchmarks."""

SEPARATE = "lora"
FROZEN = "frozen"
MODES: Mapping[str, Mapping[str, float | None]] = {
    "auto": {},
    "coefficients": {"directions": 0},
    "directions": {"directions": 2},
    "free": {"directions": LORA_RANK, "pseudo_rank": 0},
}
"""What each way of adapting fixes. ``coefficients`` starts from the backbone's own singular vectors, since a space
without bases has none to train; ``free`` is plain LoRA that is projected when it is submitted."""


@dataclass(frozen=True)
class SequenceOptions:
    """What is measured."""

    data: Path
    """Folder of text tasks, ``<task>/{train,test}.jsonl[.gz]``."""
    out: Path
    """Folder for what is finished, ``sequence.json`` and ``sequence.png``."""
    tasks: tuple[str, ...] = TASKS
    """In the order in which they arrive; task i arrives at client i modulo ``clients``."""
    modes: tuple[str, ...] = (*MODES, FROZEN)
    clients: int = 4
    rows: int = 1500
    test_rows: int = 100_000
    """Most test rows: by default all there are."""
    epochs: int = 3
    seeds: int = 3
    fixed_seeds: int = 3
    """Seeds of the fixed modes; fewer save time, and they are compared with the defaults on those."""
    k_max: int = 64
    """Largest number of basis vectors per site and side."""
    processes: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        unknown = sorted({*self.modes} - {*MODES, FROZEN})
        if unknown or "auto" not in self.modes:
            raise ConfigError(
                f"bench sequence: modes: expected auto and others of {', '.join((*MODES, FROZEN))}, got "
                f"{', '.join(self.modes)}"
            )


def run_sequence(options: SequenceOptions, note: Note) -> dict[str, Any]:
    """Run what is not finished yet, write ``sequence.json`` and ``sequence.png``, and return the report.

    Raises:
        ConfigError: data are missing, or ``out`` holds a run with other options.
    """
    parts = Parts(options.out, _described(options))
    seeds = {way: min(options.seeds, options.fixed_seeds) for way in options.modes}
    seeds |= dict.fromkeys((SEPARATE, "auto"), options.seeds)
    pairs = sorted(((way, seed) for way, count in seeds.items() for seed in range(count)), key=_urgency)
    open_ = [(options, parts, way, seed) for way, seed in pairs if not parts.has(f"{way}-{seed}")]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for way, seed, mean in pool.imap_unordered(_chain, open_, chunksize=1):
            note(f"seed {seed}, {way}: mean accuracy {mean:.4f}")
    found = {way: [parts.load(f"{way}-{seed}") for seed in range(n)] for way, n in seeds.items()}
    report = {**summary(found), "options": _described(options), "seeds": seeds}
    (options.out / "sequence.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    from share_simulations.bench.sequence_plot import write_sequence_plot

    write_sequence_plot(report, options.out / "sequence.png")
    return report


def _urgency(job: tuple[str, int]) -> tuple[bool, int]:
    """What is compared first: the defaults and LoRA."""
    way, seed = job
    return way not in ("auto", SEPARATE), seed


def _described(options: SequenceOptions) -> dict[str, Any]:
    own = asdict(options)
    for name in ("data", "out", "modes", "processes", "fixed_seeds", "seeds"):
        own.pop(name)
    return json.loads(json.dumps(own))  # type: ignore[no-any-return]


def _chain(job: tuple[SequenceOptions, Parts, str, int]) -> tuple[str, int, float]:
    """Run one way of adapting over all tasks and keep its figures."""
    options, parts, way, seed = job
    torch.set_num_threads(1)
    backbone = load_backbone("minilm", "auto")
    if way in (FROZEN, SEPARATE):
        rows = _separate(backbone, options, way, seed)
    else:
        rows = _in_space(backbone, options, way, seed)
    parts.save(f"{way}-{seed}", rows)
    return way, seed, sum(row["final"] for row in rows["tasks"]) / len(options.tasks)


def _tasks(backbone: Backbone, options: SequenceOptions, seed: int) -> list[PreparedTask]:
    folder = options.out / "rows"
    return [
        text_task(backbone, options.data, folder, name, options.rows, options.test_rows, str(seed))
        for name in options.tasks
    ]


def _separate(backbone: Backbone, options: SequenceOptions, way: str, seed: int) -> dict[str, Any]:
    """Train every task by itself."""
    training = TrainingOptions(epochs=options.epochs, seed=seed)
    rows = []
    for task in _tasks(backbone, options, seed):
        made = train_lora(backbone, task, LORA_RANK if way == SEPARATE else 0, training)
        value = evaluate(backbone, task, made.adapter, made.head).value
        rows.append(
            {
                "task": task.config.name,
                "test_rows": task.test_rows,
                "own": value,
                "final": value,
                "up": 4 * made.trained_numbers,
                "heads": 4 * sum(part.numel() for part in made.head.values()),
                "envelope": len(encode_adapter(made.adapter)) - 4 * made.trained_numbers,
                "seconds": made.seconds,
            }
        )
    return {"down": 0, "tasks": rows}


def _in_space(backbone: Backbone, options: SequenceOptions, way: str, seed: int) -> dict[str, Any]:
    """Train every task in the newest version and merge it; then measure all of them in the last one."""
    spec = describe_space("minilm", backbone.site_weights(), k_max=options.k_max)
    state, first = _start(backbone, spec, way)
    training = TrainingOptions(epochs=options.epochs, seed=seed, **MODES[way])  # type: ignore[arg-type]
    policy = MergePolicy(k_max=options.k_max)
    rows: list[dict[str, Any]] = []
    heads, down = [], first * options.clients
    originals: dict[str, Adapter] = {}
    tasks = _tasks(backbone, options, seed)
    for number, task in enumerate(tasks):
        name = f"client{number % options.clients}/{task.config.name}"
        made = train_in_space(backbone, task, state.space, name, training)
        payload = encode_update(made.update)
        sent = payload_bytes(payload)
        adapter = update_adapter(decode_update(payload, spec), state.space.bases)
        merged = merge(state, name, adapter, policy, originals)
        originals[name] = adapter
        state = merged.state
        down += len(encode_delta(merged.delta)) * options.clients
        heads.append((name, made.head))
        rows.append(
            {
                "task": task.config.name,
                "test_rows": task.test_rows,
                "own": _accuracy(backbone, task, state.space, name, made.head),
                "up": sent.coefficients + sent.directions,
                "coefficients": sent.coefficients,
                "directions": sent.directions,
                "heads": 4 * sum(part.numel() for part in made.head.values()),
                "envelope": sent.envelope,
                "seconds": made.seconds,
                "relative_error": merged.relative_error,
                "k": max(basis.k_out for basis in state.space.bases.values()),
            }
        )
    for row, task, (name, head) in zip(rows, tasks, heads, strict=True):
        row["final"] = _accuracy(backbone, task, state.space, name, head)
    return {"down": down, "first": first, "tasks": rows}


def _start(backbone: Backbone, spec: SpaceSpec, way: str) -> tuple[HubState, int]:
    """Return the state before any task, and the bytes that it took to send it to the hub, or to one client."""
    state = empty_state(spec)
    if way != "coefficients":
        return state, 0
    bases = backbone_bases(backbone.site_weights(), spec, spec.k_max)
    space = Space(0, bases, {})
    return HubState(space, {}), len(encode_snapshot(space))


def _accuracy(backbone: Backbone, task: PreparedTask, space: Space, name: str, head: Mapping[str, Any]) -> float:
    adapter = {site: Factors(one.out, one.in_) for site, one in task_adapter(space, name).items()}
    return evaluate(backbone, task, adapter, head).value
