"""What noise is worth: Renyi differential privacy of the Gaussian mechanism, in float64 and without sampling.

A release adds Gaussian noise of standard deviation ``noise_multiplier * sensitivity``. Its Renyi divergence of order a
is ``a / (2 noise_multiplier^2)`` (Mironov, arXiv 1702.07476, Corollary 3), and that of several releases is the sum
(ibid., Proposition 1), whoever chose the later ones and why. Nothing is gained here from sampling who takes part: in an
asynchronous federation nobody is drawn at random.

A curve becomes (epsilon, delta) by Proposition 12 of Canonne, Kamath and Steinke (arXiv 2004.00010)::

    epsilon = min over a of  rdp(a) + log(1 - 1/a) - log(delta a) / (a - 1)

over the orders :data:`ORDERS`. Where ``rdp < -log(1 - delta^2)``, epsilon is 0: delta alone covers it (Bretagnolle and
Huber). Orders and formula are those of dp-accounting 0.6, with which a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 100)),
    *(float(order) for order in range(11, 64)),
    128.0,
    256.0,
    512.0,
    1024.0,
)
"""Orders at which divergences are compared; those of dp-accounting."""

_MOST_NOISE = 1e6
_CLOSE = 1e-6


def gaussian_epsilon(releases: Iterable[tuple[float, int]], delta: float) -> float:
    """Return epsilon of Gaussian releases at ``delta``.

    Args:
        releases: pairs (noise multiplier above 0, how many such releases).
        delta: probability in (0, 1).
    """
    half = math.fsum(count / (2 * noise * noise) for noise, count in releases)
    return min(epsilon_at(order, order * half, delta) for order in ORDERS)


def epsilon_at(order: float, rdp: float, delta: float) -> float:
    """Return the epsilon that a Renyi divergence ``rdp`` of one order gives at ``delta``; never below 0."""
    if delta * delta + math.expm1(-rdp) > 0:
        return 0.0
    return max(0.0, rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def least_noise(epsilon: float, spent: Callable[[float], float]) -> float:
    """Return the least noise multiplier, to a millionth of itself, whose ``spent`` is at most ``epsilon``.

    Args:
        epsilon: what may be spent, above 0.
        spent: epsilon at a noise multiplier; falls as noise grows.

    Raises:
        ValueError: no noise multiplier up to a million is enough.
    """
    low, high = 0.0, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ValueError(f"no noise multiplier up to {_MOST_NOISE:g} spends as little as epsilon {epsilon:g}")
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high
