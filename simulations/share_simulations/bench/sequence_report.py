"""What the finished chains of ``share-sim bench sequence`` add up to."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

DRAWS = 10_000
"""Bootstrap draws of an interval."""

Chains = Sequence[Mapping[str, Any]]
"""One way of adapting: what every seed gave."""


def summary(found: Mapping[str, Chains]) -> dict[str, Any]:
    """Return means over tasks and seeds, paired differences with their intervals, and bytes.

    Args:
        found: by way, ``lora`` and ``auto`` among them, one mapping ``{down, tasks: [...]}`` for each seed.
    """
    ways = {way: _way(chains) for way, chains in found.items()}
    lora_up = ways["lora"]["bytes_up"]
    for own in ways.values():
        own["bytes_up_to_lora"] = own["bytes_up"] / lora_up
    final = {way: finals(chains) for way, chains in found.items()}
    auto = ways["auto"]
    return {
        "average_final": auto["final"],
        "average_lora": ways["lora"]["final"],
        "points_below_lora": -100 * difference(final["auto"], final["lora"])["mean"],
        "forgetting_points": 100 * auto["forgetting"],
        "bytes_up_to_lora": auto["bytes_up_to_lora"],
        "against_lora": {way: difference(final[way], final["lora"]) for way in final if way != "lora"},
        "auto_against": {way: difference(final["auto"], final[way]) for way in final if way != "auto"},
        "ways": ways,
        "tasks": {
            task: {way: fmean(values[task]) for way, values in final.items()} | {"forgetting": forgotten[task]}
            for forgotten in [_forgotten(found["auto"])]
            for task in final["auto"]
        },
    }


def finals(chains: Chains) -> dict[str, list[float]]:
    """Return the final accuracies by task, one for each seed."""
    return {row["task"]: [chain["tasks"][i]["final"] for chain in chains] for i, row in enumerate(chains[0]["tasks"])}


def difference(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean of ``ours - theirs`` on the same tasks, seeds and rows, with a 95 % interval.

    Where one has more seeds, the first that both have are compared.

    The interval is the percentile bootstrap over tasks, each with all its seeds: tasks differ more than seeds do.
    """
    by_task = [fmean(a - b for a, b in zip(ours[task], theirs[task], strict=False)) for task in ours]
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(by_task, k=len(by_task))) for _ in range(DRAWS))
    return {"mean": fmean(by_task), "low": means[int(0.025 * DRAWS)], "high": means[int(0.975 * DRAWS) - 1]}


def _way(chains: Chains) -> dict[str, Any]:
    """Return the figures of one way, bytes as means over the seeds."""
    averages = [fmean(row["final"] for row in chain["tasks"]) for chain in chains]

    def bytes_of(key: str) -> float:
        return fmean(sum(row.get(key, 0) for row in chain["tasks"]) for chain in chains)

    first, down = (fmean(chain.get(key, 0) for chain in chains) for key in ("first", "down"))
    up, heads, envelope = bytes_of("up") + first, bytes_of("heads"), bytes_of("envelope")
    return {
        "final": fmean(averages),
        "spread_over_seeds": stdev(averages) if len(averages) > 1 else 0.0,
        "forgetting": fmean(row["own"] - row["final"] for chain in chains for row in chain["tasks"]),
        "bytes_up": up,
        "bytes_coefficients": bytes_of("coefficients"),
        "bytes_directions": bytes_of("directions"),
        "bytes_first_bases": first,
        "bytes_heads_kept": heads,
        "bytes_envelope": envelope,
        "bytes_down": down,
        "bytes_total": up + envelope + down,
        "seconds": bytes_of("seconds"),
        "largest_k": max(row.get("k", 0) for chain in chains for row in chain["tasks"]),
    }


def _forgotten(chains: Chains) -> dict[str, float]:
    return {
        row["task"]: fmean(chain["tasks"][i]["own"] - chain["tasks"][i]["final"] for chain in chains)
        for i, row in enumerate(chains[0]["tasks"])
    }


def sequence_table(report: Mapping[str, Any]) -> Table:
    """Return the ways side by side."""
    table = Table(
        "way", "final", "minus LoRA, points (95 %)", "forgetting, points", "up / LoRA", "up", "down", "heads kept"
    )
    for way, own in report["ways"].items():
        against = report["against_lora"].get(way)
        gap = (
            ""
            if against is None
            else "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * against[k] for k in ("mean", "low", "high")))
        )
        counts = (f"{own[key]:,.0f}" for key in ("bytes_up", "bytes_down", "bytes_heads_kept"))
        table.add_row(
            way, f"{own['final']:.4f}", gap, f"{100 * own['forgetting']:.2f}", f"{own['bytes_up_to_lora']:.3f}", *counts
        )
    return table
