"""What merging has cost every task, and the proof of it.

At the merge of a task its error is measured directly. A later compaction removes a further part. Those parts are not
orthogonal to each other in general (a later append can bring a dropped direction back, MATH section 2), so between
measurements the ledger holds the triangle bound ``err <= sum of the parts``; from the retained originals it can be
measured again at any time. Every figure says which of the two it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from share_core.batching import stacks
from share_core.linalg import difference_norm, product_norm, safe_ratio
from share_core.types import Adapter, Factors

ROUNDING_ALLOWANCE = 1e-6
"""Share of a core's norm that one compaction may lose by rounding bases and cores to float32."""


@dataclass(frozen=True)
class TaskLedger:
    """Norms and error bounds of one task, per site, as Frobenius norms."""

    norms: Mapping[str, float]
    """``||dW||`` as submitted."""
    bounds: Mapping[str, float]
    """Bound on ``||dW - stored||``."""
    measured: bool
    """True while the bounds are exact measurements: no compaction has touched the task since."""

    @property
    def norm(self) -> float:
        """Norm of the whole task over all sites."""
        return math.hypot(*self.norms.values()) if self.norms else 0.0

    @property
    def bound(self) -> float:
        """Relative error bound of the whole task: ``sqrt(sum bounds^2) / sqrt(sum norms^2)``."""
        return safe_ratio(math.hypot(*self.bounds.values()) if self.bounds else 0.0, self.norm)


def measure(original: Adapter, stored: Adapter) -> TaskLedger:
    """Measure what ``stored`` lost of ``original``, site by site. Sites missing in either count as zero there."""
    pairs = {}
    for site in {**original, **stored}:
        a = original.get(site) or _zero_like(stored[site])
        b = stored.get(site) or _zero_like(original[site])
        pairs[site] = (a.out, a.in_, b.out, b.in_)
    norms: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for sites, (out_a, in_a, out_b, in_b) in stacks(pairs):
        errors = difference_norm(out_a, in_a, out_b, in_b).tolist()
        for site, error, norm in zip(sites, errors, product_norm(out_a, in_a).tolist(), strict=True):
            bounds[site], norms[site] = error, norm
    return TaskLedger(norms=norms, bounds=bounds, measured=True)


def charge(ledger: TaskLedger, losses: Mapping[str, float]) -> TaskLedger:
    """Add what a compaction removed, per site, to the bounds of a task."""
    bounds = {site: bound + losses.get(site, 0.0) for site, bound in ledger.bounds.items()}
    return TaskLedger(norms=ledger.norms, bounds=bounds, measured=False)


def ledger_to_json(ledger: Mapping[str, TaskLedger]) -> str:
    """Return the ledger of all tasks as JSON; floats survive exactly."""
    return json.dumps(
        {
            task: {"norms": dict(own.norms), "bounds": dict(own.bounds), "measured": own.measured}
            for task, own in ledger.items()
        },
        sort_keys=True,
    )


def ledger_from_json(text: str) -> dict[str, TaskLedger]:
    """Read what :func:`ledger_to_json` wrote."""
    raw: dict[str, Any] = json.loads(text)
    return {task: TaskLedger(own["norms"], own["bounds"], own["measured"]) for task, own in raw.items()}


def _zero_like(factors: Factors) -> Factors:
    return Factors(factors.out[:, :0], factors.in_[:, :0])
