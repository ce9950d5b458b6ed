"""What one merge costs: ours against the published restack and the peers, and against the machine's own limit.

One run streams adapters of one shape into a space that is full from the start (as after a cold start), so that every
merge does the whole job: project, append, choose, compact, carry coefficients. The time per update at T tasks is the
median over a window of merges from there on, plus the share of the rare slow ones, in which chunks of settled tasks are
joined: all of their excess since the first merge, spread over all merges that caused it. Peers are timed on a few sites
and scaled: sites never depend on each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from share_core.streaming.fold import fold
from share_core.streaming.state import StreamPolicy, StreamState, seeded_stack
from share_simulations.baselines.oracle import oracle
from share_simulations.baselines.paper import paper_once
from share_simulations.baselines.types import errors
from share_simulations.bench.flops import flop_counter
from share_simulations.bench.generated import MISTRAL_7B, Generator, Shape
from share_simulations.bench.machine import (
    describe,
    matrix_product_rate,
    peak_mib,
    pick_device,
    skinny_product_rate,
    timed,
)
from share_simulations.bench.ours import ours
from share_simulations.bench.peers import Peer, require_peers, time_peers

REFERENCE_TASKS = 100
"""The number of stored tasks that the scalars of the report are about."""
WINDOW = 32
"""Merges whose median one figure is: two full periods of settling tasks."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class MergeOptions:
    """What to measure."""

    shape: Shape = MISTRAL_7B
    tasks: tuple[int, ...] = (10, 100, 500)
    device: str = "auto"
    peer_sites: int = 1
    """Sites that peers are timed on."""
    error_sites: int = 2
    """Sites on which errors are compared at :data:`REFERENCE_TASKS` tasks."""
    peers: bool = True


class Limit:
    """The machine's rates, measured several times while it works: the best counts, since others may disturb."""

    def __init__(self, device: torch.device, shape: Shape) -> None:
        self._device = device
        self._columns = shape.rank
        self.square = 0.0
        """Operations per second of large square products."""
        self.skinny = 0.0
        """Operations per second of products of the bases with as many columns as an adapter has."""

    def measure(self, bases: Tensor) -> None:
        """Measure both on bases (sites, d, k)."""
        size = 4096 if bases.shape[-2] >= 1024 else 512
        self.square = max(self.square, matrix_product_rate(self._device, size))
        self.skinny = max(self.skinny, skinny_product_rate(bases, self._columns))


def run_merge(options: MergeOptions, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure, and return the report: scalars at 100 tasks (or the number nearest to it), and one row per T."""
    device = pick_device(options.device)
    if options.peers:
        require_peers()
    progress("making bases that are full from the start")
    limit = Limit(device, options.shape)
    rows, flops = _stream(options, device, limit, progress)
    reference = min(options.tasks, key=lambda t: abs(math.log(t / REFERENCE_TASKS)))
    per_update = rows[reference]
    report: dict[str, Any] = {
        "shape": vars(options.shape) | {"reference_tasks": reference},
        "machine": describe(device)
        | {
            "skinny_product_gflops": round(limit.skinny / 1e9, 1),
            "square_product_gflops": round(limit.square / 1e9, 1),
        },
        "seconds_per_update": per_update,
        "by_tasks": {str(t): {"seconds_per_update": s} for t, s in rows.items()},
        "growth": rows[max(rows)] / rows[min(rows)],
        "flops_per_update": flops,
        "roofline_fraction": flops / per_update / limit.skinny,
        "roofline_fraction_of_square_products": flops / per_update / limit.square,
        "peak_mib": round(peak_mib(device), 1),
    }
    if options.error_sites:
        report |= _errors(options, reference, progress)
    if options.peers:
        own = _ours_at(options, reference)
        peers = time_peers(options.shape, reference, options.peer_sites, own, progress)
        report |= _against(peers, per_update)
    return report


def _stream(
    options: MergeOptions, device: torch.device, limit: Limit, progress: Progress
) -> tuple[dict[int, float], int]:
    """Return seconds per update by number of stored tasks, and the products' operations in one merge."""
    source = Generator(options.shape, device)
    left, right = source.bases()
    state = StreamState((seeded_stack(source.names, left, right),), ())
    policy = StreamPolicy(k_max=options.shape.cap)
    ends = {t: (t, t + WINDOW) for t in sorted(options.tasks)}
    times: list[float] = []
    flops = 0
    last = max(end for _, end in ends.values())
    for number in range(last):
        adapter = source.adapter(number)
        if number % 10 == 0:
            progress(f"merging adapter {number} of {last}")
        if any(number == a for a, _ in ends.values()):
            limit.measure(state.stacks[0].left)
        merge = partial(fold, state, f"t{number}", adapter, policy, consume=True)
        if number == ends[min(ends)][0]:  # counted apart: counting slows the merge down
            with flop_counter() as counter:
                state = merge().state
            flops = counter.get_total_flops()
            times.append(float("nan"))
        else:
            took, folded = timed(merge, device)
            state = folded.state
            times.append(took)
    return {t: _amortised(times, a, b) for t, (a, b) in ends.items()}, flops


def _amortised(times: list[float], begin: int, end: int) -> float:
    """Return the median of a window plus what all slower merges up to its end took beyond the usual, per merge."""
    counted = [t for t in times[:end] if not math.isnan(t)]
    usual = statistics.median(counted)
    window = statistics.median(t for t in times[begin:end] if not math.isnan(t))
    return window + sum(t - usual for t in counted if t > 2 * usual) / len(counted)


def _ours_at(options: MergeOptions, tasks: int) -> tuple[float, int]:
    """Return our mean error and floats kept on the adapters that the peers are timed on."""
    source = Generator(replace(options.shape, sites=options.peer_sites), torch.device("cpu"), seed=1)
    adapters = {f"t{n}": source.adapter(n) for n in range(tasks)}
    found = ours(adapters, options.shape.cap).refitted
    return _mean(errors(adapters, found)), found.numbers


def _errors(options: MergeOptions, tasks: int, progress: Progress) -> dict[str, Any]:
    """Return mean errors on a few sites at the reference number of tasks: ours, the optimum, the published merge."""
    shape = replace(options.shape, sites=options.error_sites)
    source = Generator(shape, torch.device("cpu"), seed=1)
    adapters = {f"t{n}": source.adapter(n) for n in range(tasks)}
    progress(f"comparing errors: ours, {tasks} adapters at {shape.sites} sites")
    found = ours(adapters, shape.cap).refitted
    progress("comparing errors: the optimum (HOOI over all adapters)")
    best = oracle(adapters, shape.cap)
    progress("comparing errors: the published merge")
    paper = paper_once(adapters, shape.cap)
    mean = {c.method: _mean(errors(adapters, c)) for c in (found, best, paper)}
    return {
        "error": mean[found.method],
        "error_ratio_to_oracle": mean[found.method] / mean[best.method],
        "error_ratio_paper_to_oracle": mean[paper.method] / mean[best.method],
        "error_ratio_to_paper": mean[found.method] / mean[paper.method],
    }


def _against(peers: list[Peer], per_update: float) -> dict[str, Any]:
    """Return every peer's time per merge beside ours, and the two speed-ups that the report is read for."""
    rows = {
        peer.name: {
            "seconds_per_update": peer.seconds,
            "speedup": peer.seconds / per_update,
            "error": peer.error,
            "same_job": peer.same_job,
            "note": peer.note,
        }
        for peer in peers
    }
    restack = next(peer for peer in peers if peer.restack)
    same = [peer for peer in peers if peer.same_job]
    best = min(same, key=lambda peer: peer.seconds, default=None)
    return {
        "peers": rows,
        "speedup_vs_restack": restack.seconds / per_update,
        "speedup_vs_best_peer": None if best is None else best.seconds / per_update,
        "best_peer": None if best is None else best.name,
    }


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
