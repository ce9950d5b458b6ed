"""Our own merge in the shape of the baselines, so that one error measure serves all."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from share_core.space import task_adapter
from share_core.streaming.fold import fold
from share_core.streaming.state import StreamPolicy, empty_stream
from share_core.streaming.view import refitted, space_of
from share_core.types import Adapter, SiteSpec, Space
from share_simulations.baselines.types import Compressed


def ours_stream(adapters: Mapping[str, Adapter], cap: int, refit: bool = True) -> Compressed:
    """Compress a pool with one pass of streamed merges.

    Args:
        adapters: in order of arrival.
        cap: largest number of directions per site and side.
        refit: project every adapter once more at the end, as ``share-space merge`` does, whose adapters are at hand;
            without it, coefficients are those that were carried along.
    """
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
    space = space_of(state)
    if refit:
        space = Space(space.version, space.bases, {t: refitted(state, a) for t, a in adapters.items()})
    took = time.perf_counter() - begun
    bases = sum(b.left.numel() + b.right.numel() for b in space.bases.values())
    cores = sum(c.out.numel() + c.in_.numel() for own in space.cores.values() for c in own.values())
    stored = {task: task_adapter(space, task, torch.float64) for task in adapters}
    return Compressed("ours" if refit else "ours, carried", stored, bases + cores, took)
