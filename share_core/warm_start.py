"""Where a new task starts: what the stored tasks have in common, and no more than that.

Let ``C_1 .. C_T`` be the cores that a site holds, scaled to one norm, ``M`` their mean and ``e`` the mean of their
squared norms. Independent cores would have ``|M|^2 = e / T``: a mean of a few unrelated tasks is mostly the noise of
the few. What is left of the squared norm without it estimates that of the common part (the numerator of James and
Stein, 1961), and the start is the mean at that norm::

    start = sqrt(max(0, 1 - e / (T |M|^2))) M

With one task, or with unrelated ones, it is zero; with many that agree it tends to their mean (docs/adr/0021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from torch import Tensor

from share_core.linalg import float64, product_norm
from share_core.types import Core, Cores


def shared_start(cores: Mapping[str, Cores]) -> dict[str, Tensor]:
    """Return the start (k_out, k_in), float64, of a new task at every site where it is not zero.

    Every task counts with the same norm over all its sites, the median of the tasks' norms: who submits large numbers
    does not decide where others start. A task that leaves a site out counts as zero there.

    Args:
        cores: by task and site, all of one version.
    """
    norms = {task: norm for task, own in cores.items() if (norm := _norm(own)) > 0}
    if not norms:
        return {}
    common = median(norms.values())
    starts: dict[str, Tensor] = {}
    for site in sorted({site for task in norms for site in cores[task]}):
        parts = [common / norm * _dense(cores[task][site]) for task, norm in norms.items() if site in cores[task]]
        mean = sum(parts[1:], parts[0]) / len(norms)
        square = sum(float(part.square().sum()) for part in parts) / len(norms)
        kept = common_share(square, float(mean.square().sum()), len(norms))
        if kept > 0:
            starts[site] = kept * mean
    return starts


def common_share(mean_square: float, square_of_mean: float, count: int) -> float:
    """Return the factor of a mean of ``count`` by the formula of the module's docstring, from 0 to 1."""
    if square_of_mean <= 0:
        return 0.0
    return math.sqrt(max(0.0, 1.0 - mean_square / (count * square_of_mean)))


def _norm(own: Cores) -> float:
    return math.hypot(*(float(product_norm(core.out, core.in_)) for core in own.values()))


def _dense(core: Core) -> Tensor:
    return float64(core.out) @ float64(core.in_).T
