"""Our own merge in the shape of the baselines, so that one error measure serves all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from share_core.space import task_adapter
from share_core.streaming.fold import fold
from share_core.streaming.state import StreamPolicy, empty_stream
from share_core.streaming.view import refitted, space_of
from share_core.types import Adapter, SiteSpec, Space
from share_simulations.baselines.types import Compressed


@dataclass(frozen=True)
class Ours:
    """One pass of streamed merges over a pool."""

    carried: Compressed
    """With the coefficients that were carried along, as a stream leaves them."""
    refitted: Compressed
    """With every adapter projected once more at the end, as ``share-space merge`` does, whose adapters are at hand."""


def ours(adapters: Mapping[str, Adapter], cap: int) -> Ours:
    """Compress a pool, adapters in order of arrival, with at most ``cap`` directions per site and side."""
    begun = time.perf_counter()
    state = empty_stream(
        {
            site: SiteSpec(site, int(f.out.shape[0]), int(f.in_.shape[0]), "")
            for adapter in adapters.values()
            for site, f in adapter.items()
        }
    )
    policy = StreamPolicy(k_max=cap)
    for task, adapter in adapters.items():
        state = fold(state, task, adapter, policy, consume=True).state
    carried = space_of(state)
    streamed = time.perf_counter()
    fitted = Space(carried.version, carried.bases, {t: refitted(state, a) for t, a in adapters.items()})
    done = time.perf_counter()
    return Ours(
        _compressed("ours, carried", carried, adapters, streamed - begun),
        _compressed("ours", fitted, adapters, done - begun),
    )


def _compressed(method: str, space: Space, adapters: Mapping[str, Adapter], seconds: float) -> Compressed:
    bases = sum(b.left.numel() + b.right.numel() for b in space.bases.values())
    cores = sum(c.out.numel() + c.in_.numel() for own in space.cores.values() for c in own.values())
    stored = {task: task_adapter(space, task, torch.float64) for task in adapters}
    return Compressed(method, stored, bases + cores, seconds)
