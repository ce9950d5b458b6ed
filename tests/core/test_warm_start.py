"""What stored tasks share, and how much of their mean is not noise."""

from __future__ import annotations

import torch

from share_core.types import Core
from share_core.warm_start import shared_start


def core(seed: int, k: int = 12, rank: int = 3, scale: float = 1.0) -> Core:
    draw = torch.Generator().manual_seed(seed)
    return Core(scale * torch.randn(k, rank, generator=draw), torch.randn(k, rank, generator=draw))


def dense(one: Core) -> torch.Tensor:
    return (one.out @ one.in_.T).double()


def test_nothing_stored_and_one_task_share_nothing() -> None:
    assert shared_start({}) == {}
    assert shared_start({"o/a": {"s": core(0)}}) == {}
    assert shared_start({"o/a": {}, "o/b": {"s": Core(torch.zeros(4, 1), torch.zeros(4, 1))}}) == {}


def test_tasks_that_agree_share_all_of_it() -> None:
    same = core(1)
    start = shared_start({f"o/{n}": {"s": same} for n in range(50)})["s"]
    assert torch.allclose(start, dense(same) * (1 - 1 / 50), rtol=1e-5, atol=1e-6)
