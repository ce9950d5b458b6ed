"""Refitting over-budget tasks from their originals: the worst ones, and a bounded number per merge."""

from __future__ import annotations

import torch

from share_core.merge import MergePolicy, empty_state, merge
from share_core.types import Adapter, Factors, SiteSpec, SpaceSpec

SPEC = SpaceSpec("sha256:test", "test", {"q": SiteSpec("q", 24, 18, "0" * 64)})


def adapters_of(count: int) -> dict[str, Adapter]:
    g = torch.Generator().manual_seed(7)
    return {
        f"org/t{n}": {"q": Factors(torch.randn(24, 3, generator=g), torch.randn(18, 3, generator=g))}
        for n in range(count)
    }


def test_a_merge_refits_the_worst_tasks_and_no_more_than_it_may() -> None:
    """Reading originals must not grow with the number of tasks that are over their budget."""
    adapters = adapters_of(9)
    read: list[str] = []

    class Counted(dict[str, Adapter]):
        def __getitem__(self, task: str) -> Adapter:
            read.append(task)
            return super().__getitem__(task)

    policy = MergePolicy(k_max=6, tau=0.01, refits=2)
    state = empty_state(SPEC)
    for task, adapter in adapters.items():
        before = state
        read.clear()
        state = merge(state, task, adapter, policy, Counted(adapters)).state
        assert len(read) <= 2
        for done in read:
            assert state.ledger[done].measured
        waiting = [t for t in before.ledger if t not in read and not state.ledger[t].measured]
        carried = merge(before, task, adapter, policy).state.ledger
        assert all(carried[w].bound <= carried[d].bound for w in waiting for d in read)
    assert len(read) == 2
