"""What a shared subspace of a given size costs each task: ours and every baseline on the same adapters."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from share_core.errors import ConfigError
from share_core.peft.reader import read_adapter
from share_core.types import Adapter
from share_simulations.baselines.dense_svd import dense_svd
from share_simulations.baselines.lorashare_peer import lorashare
from share_simulations.baselines.oracle import oracle
from share_simulations.baselines.paper import paper_once, paper_stream
from share_simulations.baselines.peft_svd import peft_svd
from share_simulations.baselines.types import Compressed, errors
from share_simulations.baselines.vlora import vlora_once
from share_simulations.bench.generated import Generator, Shape
from share_simulations.bench.machine import describe, peak_mib
from share_simulations.bench.ours import ours

Progress = Callable[[str], None]
Pool = Mapping[str, Adapter]
GENERATED = Shape(sites=4, d_out=96, d_in=64, rank=4, cap=16)
"""The pool that is used where none is given: 12 adapters."""
LOSSLESS = 1e-5
"""Error below which a pool counts as kept without loss."""


@dataclass(frozen=True)
class CompressOptions:
    """What to measure."""

    pools: tuple[Path, ...] = ()
    """Folders of PEFT adapter directories, one pool each; none takes a generated pool."""
    caps: tuple[int, ...] = (16, 24, 32, 48, 64)
    orders: int = 5
    """Random orders of arrival that ours is streamed in."""
    peers: bool = True
    """Whether packages beside the published merge and the optimum are run too."""


def run_compress(options: CompressOptions, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure, and return the report: per pool and cap, every method's error and size, and ours in each order."""
    pools = {_name(path): read_pool(path) for path in options.pools} or {"generated": _generated()}
    report: dict[str, Any] = {"machine": describe(torch.device("cpu")), "pools": {}}
    for name, pool in pools.items():
        caps = {str(cap): _at_cap(name, pool, cap, options, progress) for cap in options.caps}
        report["pools"][name] = {"adapters": len(pool), "floats": _floats(pool), "caps": caps}
    comparable = [row for pool in report["pools"].values() if pool["adapters"] >= 4 for row in pool["caps"].values()]
    lossy = [row for row in comparable if row["oracle_error"] >= LOSSLESS]
    every = [row for pool in report["pools"].values() for row in pool["caps"].values()]
    return report | {
        "error_ratio_to_oracle": max((row["worst_ratio_to_oracle"] for row in lossy), default=1.0),
        "error_ratio_paper_to_oracle": max((row["paper_ratio_to_oracle"] for row in lossy), default=1.0),
        "error_ratio_to_paper": max((row["ratio_to_paper"] for row in lossy), default=1.0),
        "lossless_error": max((row["ours_worst"] for row in every if row["oracle_error"] < LOSSLESS), default=0.0),
        "peak_mib": round(peak_mib(torch.device("cpu")), 1),
    }


def read_pool(folder: Path) -> dict[str, Adapter]:
    """Return every PEFT adapter directory in a folder, by its name.

    Raises:
        ConfigError: if there is none.
    """
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (path / "adapter_config.json").is_file():
            found[path.name] = read_adapter(path).factors
    if not found:
        raise ConfigError(f"{folder} holds no PEFT adapter directory: give a folder of adapter directories")
    return found


def _at_cap(name: str, pool: Pool, cap: int, options: CompressOptions, progress: Progress) -> dict[str, Any]:
    progress(f"{name}, cap {cap}: ours in {options.orders} orders, the optimum, the published merge")
    best, paper = _measured(pool, oracle(pool, cap)), _measured(pool, paper_once(pool, cap))
    carried, refit = [], []
    for seed in range(options.orders):
        order = list(pool)
        random.Random(seed).shuffle(order)
        shuffled = {task: pool[task] for task in order}
        found = ours(shuffled, cap)
        carried.append(_measured(pool, found.carried))
        refit.append(_measured(pool, found.refitted))
    methods = {"oracle": best, "paper once": paper, "ours": refit[0], "ours, carried": carried[0]}
    if options.peers:
        methods |= _peers(name, pool, cap, progress)
    worst = max(row["mean"] for row in (*refit, *carried))
    return {
        "methods": methods,
        "ours_by_order": [row["mean"] for row in refit],
        "ours_carried_by_order": [row["mean"] for row in carried],
        "ours_worst": worst,
        "oracle_error": best["mean"],
        "paper_error": paper["mean"],
        "worst_ratio_to_oracle": _ratio(worst, best["mean"]),
        "paper_ratio_to_oracle": _ratio(paper["mean"], best["mean"]),
        "ratio_to_paper": _ratio(worst, paper["mean"]),
    }


def _peers(name: str, pool: Pool, cap: int, progress: Progress) -> dict[str, Any]:
    """Return the other methods; one that cannot take this pool gives its reason."""
    rank = max(f.rank for adapter in pool.values() for f in adapter.values())
    methods: dict[str, Callable[[], Compressed]] = {
        "paper once, centred": lambda: paper_once(pool, cap, centred=True),
        "paper stream": lambda: paper_stream(pool, cap),
        "vlora-dev": lambda: vlora_once(pool, max(1, cap // rank)),
        "lorashare": lambda: lorashare(pool, cap),
        "PEFT svd (one adapter for all)": lambda: peft_svd(pool, cap),
        "FlexLoRA (one adapter for all)": lambda: dense_svd(pool, cap),
    }
    found: dict[str, Any] = {}
    for method, run in methods.items():
        progress(f"{name}, cap {cap}: {method}")
        try:
            found[method] = _measured(pool, run())
        except ConfigError as error:
            found[method] = {"skipped": str(error)}
    return found


def _measured(pool: Pool, found: Compressed) -> dict[str, float]:
    own = errors(pool, found)
    return {
        "mean": sum(own.values()) / len(own),
        "max": max(own.values()),
        "numbers": found.numbers,
        "compression": _floats(pool) / found.numbers,
        "seconds": round(found.seconds, 4),
    }


def _ratio(part: float, whole: float) -> float:
    """Return a ratio of two errors; two that are rounding are equal."""
    return 1.0 if max(part, whole) < LOSSLESS else part / whole if whole > 0 else float("inf")


def _floats(pool: Pool) -> int:
    return sum(f.out.numel() + f.in_.numel() for adapter in pool.values() for f in adapter.values())


def _generated() -> dict[str, Adapter]:
    source = Generator(GENERATED, torch.device("cpu"))
    return {f"t{n}": source.adapter(n) for n in range(12)}


def _name(path: Path) -> str:
    return path.resolve().name


def compress_table(report: dict[str, Any]) -> Table:
    """Return the figures of a report for people."""
    table = Table("pool", "cap", "method", "mean error", "max", "compression", "seconds")
    for pool, own in report["pools"].items():
        for cap, row in own["caps"].items():
            for method, figures in row["methods"].items():
                if "skipped" in figures:
                    table.add_row(pool, cap, method, f"[dim]{figures['skipped']}[/dim]")
                    continue
                table.add_row(
                    pool,
                    cap,
                    method,
                    f"{figures['mean']:.4f}",
                    f"{figures['max']:.4f}",
                    f"{figures['compression']:.2f} x",
                    f"{figures['seconds']:.2f}",
                )
            table.add_section()
    return table
