"""Random numbers that nobody else can compute: noise and sampling for differential privacy.

The seed of a task orders rows and starts factors, and anybody may know it. Noise drawn from it could be subtracted
again, so noise and the choice of rows come from the operating system. No seed can be given here, on purpose.

Every normal number is the sum of four, divided by two: that hides in which bits a floating-point generator leaves
holes (Holohan and Braghin, arXiv 2107.10138, section 5.1). Each of the four stays within 8.6 standard deviations.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor

_ADDED = 4


def system_uniform(count: int) -> Tensor:
    """Return ``count`` independent uniform numbers in (0, 1], multiples of 2^-53, in float64."""
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return torch.from_numpy(((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53)


def system_normal(shape: tuple[int, ...]) -> Tensor:
    """Return independent standard normal numbers of a shape in float64, by Box and Muller."""
    count = _ADDED * math.prod(shape)
    half = -(-count // 2)
    radius, angle = (-2 * system_uniform(half).log()).sqrt(), 2 * math.pi * system_uniform(half)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
    return pairs.reshape(_ADDED, *shape).sum(dim=0) / math.sqrt(_ADDED)


def system_sample(rows: int, rate: float) -> list[int]:
    """Return the rows of one Poisson sample: each row with probability ``rate``, independently."""
    taken: list[int] = torch.nonzero(system_uniform(rows) <= rate).flatten().tolist()
    return taken
