"""Ten thousand merges: whether the bases stay orthonormal, the ledger true and the memory flat."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from share_core.ledger import measure
from share_core.space import task_adapter
from share_core.streaming.fold import fold
from share_core.streaming.state import StreamPolicy, StreamState, empty_stream
from share_core.streaming.view import bases_of, ledger_of, space_of
from share_core.types import Adapter
from share_simulations.bench.generated import Generator, Shape

SMALL = Shape(sites=2, d_out=32, d_in=24, rank=2, cap=8)


@dataclass(frozen=True)
class EnduranceOptions:
    """What to run."""

    merges: int = 10_000
    shape: Shape = SMALL
    tasks: int = 30
    """Tasks that take turns: after the first round every merge replaces one, so that memory can be flat at all."""
    window: int = 4
    checks: int = 20
    """How often everything is compared with the dense truth on the way."""


@dataclass(frozen=True)
class _Check:
    departure: float
    """Largest entry of ``L^T L - I``."""
    ledger_gap: float
    """Largest difference of a recomputed ledger from the dense error, relative to the task."""
    violations: int
    """Tasks whose bound is below their error."""
    tensor_bytes: int
    """Bytes of all live tensors."""


def run_endurance(options: EnduranceOptions, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Merge, check on the way, and return the worst of all checks."""
    source = Generator(options.shape, torch.device("cpu"), seed=3)
    state = empty_stream(source.specs)
    policy = StreamPolicy(k_max=options.shape.cap, window=options.window)
    originals: dict[str, Adapter] = {}
    checks: list[_Check] = []
    every = max(1, options.merges // options.checks)
    for number in range(options.merges):
        task = f"t{number % options.tasks}"
        originals[task] = source.adapter(number)
        state = fold(state, task, originals[task], policy, consume=True).state
        if (number + 1) % every == 0:
            progress(f"{number + 1} merges")
            checks.append(_check(state, originals))
    steady = checks[len(checks) // 2 :]
    return {
        "merges": options.merges,
        "orthonormal_departure": max(check.departure for check in checks),
        "ledger_gap": max(check.ledger_gap for check in checks),
        "bound_violations": sum(check.violations for check in checks),
        "tensor_bytes_growth": max(c.tensor_bytes for c in steady) - min(c.tensor_bytes for c in steady),
        "tensor_bytes": steady[-1].tensor_bytes,
    }


def _check(state: StreamState, originals: dict[str, Adapter]) -> _Check:
    space, ledger = space_of(state), ledger_of(state)
    gap, violations = 0.0, 0
    for task, original in originals.items():
        stored = task_adapter(space, task, torch.float64)
        truth, norm = _dense_error(original, stored)
        gap = max(gap, abs(measure(original, stored).bound - truth / norm))
        violations += ledger[task].bound * ledger[task].norm < truth
    departure = 0.0
    for basis in bases_of(state).values():
        for side in (basis.left.double(), basis.right.double()):
            departure = max(departure, float((side.T @ side - torch.eye(side.shape[1])).abs().max()))
    return _Check(departure, gap, violations, _tensor_bytes())


def _dense_error(original: Adapter, stored: Adapter) -> tuple[float, float]:
    """Return ``||dW - dW^||`` and ``||dW||`` over all sites from whole matrices: the obvious slow way."""
    lost2 = whole2 = 0.0
    for site, f in original.items():
        dense = f.out.double() @ f.in_.double().T
        kept = stored[site].out @ stored[site].in_.T if site in stored else torch.zeros_like(dense)
        lost2 += float((dense - kept).square().sum())
        whole2 += float(dense.square().sum())
    return math.sqrt(lost2), math.sqrt(whole2)


def _tensor_bytes() -> int:
    gc.collect()
    seen: dict[int, int] = {}
    for value in gc.get_objects():
        if type(value) is torch.Tensor:
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
