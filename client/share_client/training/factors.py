"""The trainable change of one site, and the learning rate that each of its parts needs.

At a site with bases ``L`` (d_out, k_out) and ``R`` (d_in, k_in)::

    dW = L E_o (R E_i).T + B A.T

``E_o`` (k_out, p) and ``E_i`` (k_in, p) are the factors of the core, ``B`` (d_out, phi) and ``A`` (d_in, phi) the free
directions. The bases are frozen.

Adam moves every number by about the learning rate, so a step on a column of B moves dW by ``lr sqrt(d_out)`` times the
norm of the column of A, but a step on a column of E_o only by ``lr sqrt(k_out)``. The cores' rate is therefore
multiplied by ``sqrt(384 / k)``, that of free directions by ``sqrt(384 / d)``, and all ``in_`` columns start with the
same norm :data:`IN_NORM`. So one learning rate serves subspaces of any size, and backbones of any width.

Few columns need larger steps than many: the gradient of a task is concentrated, so all columns of a factor learn much
the same direction, and phi of them together move dW only phi / 8 as far as the 8 columns of the LoRA for which the
learning rate is meant. The rate of free directions is therefore multiplied by ``8 / phi`` as well. Measured on MiniLM
(1,500 rows, 3 epochs, 2 directions, empty space, one seed), accuracy at 1, 2 and 4 times the plain rate: trec .932,
.940, .948; sst2 .831, .835, .841.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from share_core.types import Core, SiteBasis

IN_NORM = 2 / math.sqrt(3)
"""Norm of the ``in_`` columns at the start: LoRA's (uniform in +-1/sqrt(d_in)) times its scale alpha / r = 2."""

REFERENCE_WIDTH = 384
"""Length of the columns for which ``learning_rate`` is meant: the width of MiniLM."""


REFERENCE_COLUMNS = 8
"""Number of columns for which ``learning_rate`` is meant: the usual rank of LoRA."""


IN_RATE = 2.0
"""Multiple of the rate of ``in_`` columns that are as many as a LoRA's: a LoRA's are half as long, at its usual scale
alpha / r = 2, and take the same steps, so they turn twice as fast."""


def rate_for(length: int) -> float:
    """Return the multiple of the learning rate for columns of this length: ``sqrt(REFERENCE_WIDTH / length)``."""
    return math.sqrt(REFERENCE_WIDTH / max(1, length))


@dataclass(frozen=True)
class Rated:
    """A parameter with its multiple of the learning rate."""

    parameter: nn.Parameter
    multiple: float


class SiteFactors(nn.Module):
    """A change of one weight as thin factors ``out`` (d_out, r), ``in_`` (d_in, r)."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``out`` and ``in_``, differentiable in the parameters."""
        raise NotImplementedError

    def rated(self) -> Sequence[Rated]:
        """Return the trainable parameters with their multiples of the learning rate."""
        return []


class FixedFactors(SiteFactors):
    """Given factors, for evaluation."""

    out: Tensor
    in_: Tensor

    def __init__(self, out: Tensor, in_: Tensor) -> None:
        super().__init__()
        self.register_buffer("out", out)
        self.register_buffer("in_", in_)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the given factors."""
        return self.out, self.in_


class LoraFactors(SiteFactors):
    """Plain LoRA (arXiv 2106.09685): ``dW = alpha / r * B A`` with B zero and A uniform in +-1/sqrt(d_in)."""

    def __init__(self, d_out: int, d_in: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.out = nn.Parameter(torch.zeros(d_out, rank))
        self.in_ = nn.Parameter((2 * torch.rand(d_in, rank) - 1) / math.sqrt(d_in))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``(alpha / r) B`` and ``A.T``."""
        return self.scale * self.out, self.in_

    def rated(self) -> Sequence[Rated]:
        """Both factors at the plain rate."""
        return [Rated(self.out, rate_for(self.out.shape[0])), Rated(self.in_, rate_for(self.in_.shape[0]))]


class SpaceFactors(SiteFactors):
    """A core in frozen bases plus free directions."""

    left: Tensor
    right: Tensor

    def __init__(self, basis: SiteBasis, core: Core, free_in: Tensor, wide: bool = False) -> None:
        """Start from a core (p columns) and free ``in_`` directions (d_in, phi); their ``out`` starts at zero.

        Args:
            basis: of the site.
            core: where the coefficients start.
            free_in: where the free directions start.
            wide: whether the free directions are as many as a LoRA's: then they learn at a LoRA's rates. Otherwise
                they are few, and learn faster.
        """
        super().__init__()
        few = REFERENCE_COLUMNS / max(1, free_in.shape[1])
        self._rates = (1.0, IN_RATE) if wide else (few, few)
        self.register_buffer("left", basis.left)
        self.register_buffer("right", basis.right)
        self.core_out = nn.Parameter(core.out.clone())
        self.core_in = nn.Parameter(core.in_.clone())
        self.free_in = nn.Parameter(free_in.clone())
        self.free_out = nn.Parameter(free_in.new_zeros(basis.left.shape[0], free_in.shape[1]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``[L E_o, B]`` and ``[R E_i, A]``."""
        out = torch.cat([self.left @ self.core_out, self.free_out], dim=1)
        return out, torch.cat([self.right @ self.core_in, self.free_in], dim=1)

    def rated(self) -> Sequence[Rated]:
        """Core factors and free directions, by the rules of the module's docstring."""
        return [
            Rated(self.core_out, rate_for(self.left.shape[1])),
            Rated(self.core_in, rate_for(self.right.shape[1])),
            Rated(self.free_out, self._rates[0] * rate_for(self.left.shape[0])),
            Rated(self.free_in, self._rates[1] * rate_for(self.right.shape[0])),
        ]
