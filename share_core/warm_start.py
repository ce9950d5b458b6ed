"""Where a new task starts: what the stored tasks have in common, and no more than that.

Let ``C_1 .. C_T`` be the cores that a site holds, scaled to one norm. Their mean ``M`` estimates what a further task is
likely to need, but a mean of a few unrelated tasks is mostly the noise of the few: independent cores of mean square
norm ``e`` would have ``|M|^2 = e / T``. The positive-part rule of James and Stein (1961) takes that much out::

    start = max(0, 1 - e / (T |M|^2)) M

With one task, or with unrelated ones, the factor is zero and the start is none; with many that agree it tends to one.
(docs/adr/0020)
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from share_core.linalg import float64
from share_core.types import Core, Cores


def shared_start(cores: Mapping[str, Cores]) -> dict[str, Tensor]:
    """Return the shrunken mean (k_out, k_in) of the stored cores at every site where it is not zero, float64.

    Every task counts with the same norm over all its sites, the median of the tasks' norms: who submits large numbers
    does not decide where others start. A task that leaves a site out counts as zero there.

    Args:
        cores: by task and site, all of one version.
    """
    norms = {task: _norm(own) for task, own in cores.items()}
    norms = {task: norm for task, norm in norms.items() if norm > 0}
    if not norms:
        return {}
    common = median(norms.values())
    starts: dict[str, Tensor] = {}
    for site in sorted({site for task in norms for site in cores[task]}):
        parts = [common / norm * _dense(cores[task][site]) for task, norm in norms.items() if site in cores[task]]
        mean = sum(parts[1:], parts[0]) / len(norms)
        square = sum(float(part.square().sum()) for part in parts) / len(norms)
        kept = shrinkage(square, float(mean.square().sum()), len(norms))
        if kept > 0:
            starts[site] = kept * mean
    return starts


def shrinkage(mean_square: float, square_of_mean: float, count: int) -> float:
    """Return ``max(0, 1 - mean_square / (count square_of_mean))``: the share of a mean that is not noise."""
    if square_of_mean <= 0:
        return 0.0
    return max(0.0, 1.0 - mean_square / (count * square_of_mean))


def _dense(core: Core) -> Tensor:
    return float64(core.out) @ float64(core.in_).T


def _norm(own: Cores) -> float:
    squares = [
        torch.trace((float64(c.out).T @ float64(c.out)) @ (float64(c.in_).T @ float64(c.in_))) for c in own.values()
    ]
    return float(torch.stack(squares).sum().clamp_min(0).sqrt()) if squares else 0.0
