"""What the subspace that others filled is worth to a new task with few rows.

A space is merged from adapters of other tasks. Then every new task is trained, on the same rows and with the same
number of passes, as

* ``learned``: in that space, by the default settings, as a client does;
* ``random_basis_default``: the same in as many orthonormal random directions;
* ``learned_coefficients``: in that space, coefficients only;
* ``learned_zero``: the same without its stored cores, so that nothing but the bases carries over;
* ``random_basis`` and ``backbone_basis``: coefficients only, in as many random directions or singular vectors of the
  backbone;
* ``lora``: a separate LoRA of rank 8, and ``lora_double_rate`` at twice its rate, the default's for so few steps;
* ``frozen``: a head on the frozen backbone.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.table import Table

from share_client.training import (
    Backbone,
    PreparedTask,
    TrainingOptions,
    evaluate,
    load_backbone,
    train_in_space,
    train_lora,
)
from share_client.training.options import DEFAULT_RATE
from share_core.cold_start import backbone_bases
from share_core.errors import ConfigError
from share_core.fingerprint import describe_space
from share_core.merge import HubState, MergePolicy, empty_state, merge
from share_core.peft.reader import read_adapter
from share_core.space import update_adapter
from share_core.types import Adapter, SiteBasis, Space, SpaceSpec
from share_simulations.bench.parts import Parts
from share_simulations.bench.sequence_report import difference
from share_simulations.bench.texts import text_task

Note = Callable[[str], None]

LORA_RANK = 8
WAYS = (
    "frozen",
    "lora",
    "lora_double_rate",
    "random_basis",
    "backbone_basis",
    "learned_zero",
    "learned_coefficients",
    "random_basis_default",
    "learned",
)
BY_DEFAULT = ("learned", "random_basis_default")
"""Ways that leave the number of directions to the client; the others in a space train coefficients only."""
NEW = ("agnews", "cr", "snips", "trec", "tweet_emotion", "mrpc")
"""Default new tasks: one of each kind of text task that the others are made of."""


@dataclass(frozen=True)
class TransferOptions:
    """What is measured."""

    data: Path
    """Folder of text tasks, ``<task>/{train,test}.jsonl[.gz]``."""
    adapters: Path
    """Folder of PEFT adapters for MiniLM by task; all but the new ones are merged, in alphabetical order."""
    tasks: tuple[str, ...] = NEW
    rows: int = 100
    test_rows: int = 1000
    epochs: tuple[int, ...] = (1, 10)
    """Passes over the rows; every way is trained anew for each. The scalars of the report are of the last."""
    seeds: int = 3
    """Each draws other training rows, other starts and another random basis."""
    processes: int = 2
    ways: tuple[str, ...] = WAYS
    """``learned`` among them."""
    k_max: int = 64

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if {*self.ways} - {*WAYS} or "learned" not in self.ways:
            raise ConfigError(
                f"bench transfer: ways: expected learned and others of {', '.join(WAYS)}, got {', '.join(self.ways)}"
            )


def run_transfer(options: TransferOptions, out: Path | None, note: Note) -> dict[str, Any]:
    """Measure and return the report; ``transfer.json`` and ``transfer.png`` are written to ``out``.

    What is finished is kept in ``out``, and not measured again.

    Raises:
        ConfigError: data or adapters are missing, or ``out`` holds a run with other options.
    """
    others = _others(options)
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedshare-transfer-")))
        own = asdict(options)
        parts = Parts(out or folder, {name: own[name] for name in own if name not in ("processes", "seeds")})
        jobs = [(options, folder, parts, task, seed) for seed in range(options.seeds) for task in options.tasks]
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(context.Pool(options.processes, _prepare, (options,)))
        for one in pool.imap(_measured, jobs):
            values = ", ".join(f"{way} {value:.3f}" for way, value in one["values"][str(options.epochs[-1])].items())
            note(f"{one['task']}, seed {one['seed']}: {values}")
            found.append(one)
    report = {
        **report_of(found, options.epochs, options.ways),
        "merged": [path.name for path in others],
        "rows": options.rows,
    }
    if out is not None:
        from share_simulations.bench.transfer_plot import write_transfer_plot

        out.mkdir(parents=True, exist_ok=True)
        (out / "transfer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write_transfer_plot(report, out / "transfer.png")
    return report


def report_of(found: Sequence[Mapping[str, Any]], epochs: Sequence[int], ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """Return averages over tasks and seeds, with differences of ``learned`` to each other way and their intervals."""
    by_epochs: dict[str, dict[str, Any]] = {}
    for passes in epochs:
        values = {way: _by_task(found, passes, way) for way in ways}
        seeds = sorted({one["seed"] for one in found})
        by_epochs[str(passes)] = {
            "means": {way: _mean(own) for way, own in values.items()},
            "spread_over_seeds": {way: _spread(own, len(seeds)) for way, own in values.items()},
            "learned_minus": {
                way: difference(values["learned"], own) for way, own in values.items() if way != "learned"
            },
            "table": {task: {way: fmean(values[way][task]) for way in ways} for task in values["learned"]},
        }
    last = by_epochs[str(epochs[-1])]
    return {**last["means"], "epochs": epochs[-1], "table": last["table"], "by_epochs": by_epochs, "runs": list(found)}


def _by_task(found: Sequence[Mapping[str, Any]], passes: int, way: str) -> dict[str, list[float]]:
    own: dict[str, list[float]] = {}
    for one in found:
        own.setdefault(one["task"], []).append(one["values"][str(passes)][way])
    return own


def _mean(own: Mapping[str, Sequence[float]]) -> float:
    return fmean(value for values in own.values() for value in values)


def _spread(own: Mapping[str, Sequence[float]], seeds: int) -> float:
    """Return the standard deviation over seeds of the mean over tasks."""
    return stdev(fmean(values[i] for values in own.values()) for i in range(seeds)) if seeds > 1 else 0.0


def _others(options: TransferOptions) -> list[Path]:
    paths = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json"))
    paths = [path for path in paths if path.name not in options.tasks]
    if not paths:
        raise ConfigError(
            f"{options.adapters}: expected PEFT adapters of other tasks in folders of their own, got none"
        )
    return paths


_READY: list[tuple[Backbone, SpaceSpec, Space]] = []


def _prepare(options: TransferOptions) -> None:
    """Load the backbone and merge the space, once in every process."""
    torch.set_num_threads(1)
    backbone = load_backbone("minilm", "auto")
    spec = describe_space("minilm", backbone.site_weights(), k_max=options.k_max)
    _READY.append((backbone, spec, _merged(options, spec).space))


def _merged(options: TransferOptions, spec: SpaceSpec) -> HubState:
    state, originals = empty_state(spec), dict[str, Adapter]()
    policy = MergePolicy(k_max=options.k_max)
    for path in _others(options):
        name = f"others/{path.name}"
        originals[name] = _on_sites(read_adapter(path).factors, spec, path)
        state = merge(state, name, originals[name], policy, originals).state
    return state


def _on_sites(factors: Adapter, spec: SpaceSpec, path: Path) -> Adapter:
    """Return an adapter under the names of the space; PEFT may put a prefix such as ``bert.`` before them."""
    named = {}
    for key, one in factors.items():
        sites = [site for site in spec.sites if key == site or key.endswith(f".{site}") or site.endswith(f".{key}")]
        if len(sites) != 1:
            raise ConfigError(f"{path}: expected a site of MiniLM, got {key!r}; name adapters for this backbone")
        named[sites[0]] = one
    return named


def _measured(job: tuple[TransferOptions, Path, Parts, str, int]) -> dict[str, Any]:
    """Train one new task in every way, for every number of passes, and keep the figures."""
    options, folder, parts, name, seed = job
    if parts.has(f"{name}-{seed}"):
        return dict(parts.load(f"{name}-{seed}"))
    backbone, spec, space = _READY[0]
    task = text_task(backbone, options.data, folder, name, options.rows, options.test_rows, str(seed))
    random = Space(space.version, random_bases(space, seed), {})
    spaces = {
        "learned": space,
        "learned_coefficients": space,
        "learned_zero": replace(space, cores={}),
        "random_basis": random,
        "random_basis_default": random,
        "backbone_basis": Space(space.version, backbone_bases(backbone.site_weights(), spec, options.k_max), {}),
    }
    values = {}
    for passes in options.epochs:
        training = TrainingOptions(epochs=passes, seed=seed)
        values[str(passes)] = {way: _trained(backbone, task, way, spaces, training) for way in options.ways}
    figures = {"task": name, "seed": seed, "test_rows": task.test_rows, "values": values}
    parts.save(f"{name}-{seed}", figures)
    return figures


def _trained(
    backbone: Backbone, task: PreparedTask, way: str, spaces: Mapping[str, Space], training: TrainingOptions
) -> float:
    if way in spaces:
        training = training if way in BY_DEFAULT else replace(training, directions=0)
        made = train_in_space(backbone, task, spaces[way], f"new/{task.config.name}", training)
        return evaluate(backbone, task, update_adapter(made.update, spaces[way].bases), made.head).value
    if way != "frozen":
        training = replace(training, learning_rate=(2 if way == "lora_double_rate" else 1) * DEFAULT_RATE)
    separate = train_lora(backbone, task, 0 if way == "frozen" else LORA_RANK, training)
    return evaluate(backbone, task, separate.adapter, separate.head).value


def random_bases(space: Space, seed: int) -> dict[str, SiteBasis]:
    """Return random orthonormal bases of the same shapes as those of ``space``."""
    draw = torch.Generator().manual_seed(1000 + seed)

    def like(basis: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.linalg.qr(torch.randn(basis.shape, generator=draw)).Q
        return made

    return {site: SiteBasis(like(basis.left), like(basis.right)) for site, basis in space.bases.items()}


def transfer_table(report: Mapping[str, Any]) -> Table:
    """Return the ways side by side, for every number of passes."""
    table = Table("passes", "way", "accuracy", "spread over seeds", "learned minus it, points (95 %)")
    for passes, own in report["by_epochs"].items():
        for way, value in own["means"].items():
            gap = own["learned_minus"].get(way)
            words = "" if gap is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in gap.values()))
            table.add_row(passes, way, f"{value:.4f}", f"{own['spread_over_seeds'][way]:.4f}", words)
        table.add_section()
    return table
