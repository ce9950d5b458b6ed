"""Our accountant of Gaussian releases against dp-accounting's, on random schedules."""

from __future__ import annotations

import math
import random
from typing import Any

from share_core.errors import ConfigError
from share_core.privacy import gaussian_epsilon


def compare_accountants(schedules: int, seed: int = 0) -> dict[str, Any]:
    """Return how far epsilon of random schedules is from dp-accounting's, and how far below it at most.

    Args:
        schedules: how many; each has one to eight kinds of releases, up to 1,000 of each, at a random delta, with
            epsilons from hundredths to hundreds.
        seed: chooses them.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise ConfigError("this comparison needs dp-accounting: pip install 'fedshare[privacy]'") from error
    draw = random.Random(seed)
    largest, optimistic = 0.0, 0.0
    for _ in range(schedules):
        kinds = [(10 ** draw.uniform(-1, 1), int(10 ** draw.uniform(0, 3))) for _ in range(draw.randint(1, 8))]
        scale = math.sqrt(sum(count / (2 * noise**2) for noise, count in kinds) / 10 ** draw.uniform(-4, 1.5))
        releases = [(noise * scale, count) for noise, count in kinds]
        delta = 10 ** draw.uniform(-12, -2)
        accountant = rdp.RdpAccountant()
        for noise, count in releases:
            accountant.compose(dp_accounting.GaussianDpEvent(noise), count)
        theirs, ours = float(accountant.get_epsilon(delta)), gaussian_epsilon(releases, delta)
        largest, optimistic = max(largest, abs(ours - theirs)), max(optimistic, theirs - ours)
    return {"schedules": schedules, "largest_difference": largest, "largest_optimism": optimistic}
