"""Adapters of a given shape that resemble a pool: partly in directions that all share, partly in their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.types import Adapter, Factors, SiteSpec

SHARED = 96
"""Directions per site and side that all adapters draw from, with strengths falling like 1/j."""
OWN = 0.5
"""Size of an adapter's private part beside its shared part."""


@dataclass(frozen=True)
class Shape:
    """What a family of adapters looks like."""

    sites: int
    d_out: int
    d_in: int
    rank: int
    cap: int


MISTRAL_7B = Shape(sites=128, d_out=4096, d_in=4096, rank=16, cap=256)
"""32 layers, q k v o, d 4096, r 16, k 256. The model's own k and v are 1024 x 4096 (grouped queries); here all four are
full, which makes the job larger than the real one."""


class Generator:
    """Draws adapters of one family; the same seed and number give the same adapter on the same device type."""

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0) -> None:
        self._shape = shape
        self._device = device
        self._seed = seed
        g = self._generator(-1)
        self._shared = {
            side: torch.randn(shape.sites, d, SHARED, generator=g, device=device) / d**0.5
            for side, d in (("out", shape.d_out), ("in", shape.d_in))
        }
        self._decay = 1.0 / torch.arange(1, SHARED + 1, device=device, dtype=torch.float32) ** 0.5

    @property
    def names(self) -> list[str]:
        """Site names."""
        return [f"site.{i:03d}" for i in range(self._shape.sites)]

    @property
    def specs(self) -> dict[str, SiteSpec]:
        """The sites as a space knows them."""
        return {name: SiteSpec(name, self._shape.d_out, self._shape.d_in, "") for name in self.names}

    def adapter(self, number: int) -> Adapter:
        """Return the adapter of that number: float32 factors at every site."""
        g = self._generator(number)
        out, in_ = self._side("out", self._shape.d_out, g), self._side("in", self._shape.d_in, g)
        return {name: Factors(out[i], in_[i]) for i, name in enumerate(self.names)}

    def bases(self) -> tuple[Tensor, Tensor]:
        """Return orthonormal bases (sites, d, cap) for a space that starts full, as after a cold start."""
        g = self._generator(-2)
        return (
            torch.linalg.qr(
                torch.randn(self._shape.sites, self._shape.d_out, self._shape.cap, generator=g, device=self._device)
            ).Q.contiguous(),
            torch.linalg.qr(
                torch.randn(self._shape.sites, self._shape.d_in, self._shape.cap, generator=g, device=self._device)
            ).Q.contiguous(),
        )

    def _side(self, side: str, d: int, g: torch.Generator) -> Tensor:
        s, r = self._shape.sites, self._shape.rank
        mix = torch.randn(s, SHARED, r, generator=g, device=self._device) * self._decay.unsqueeze(-1)
        own = torch.randn(s, d, r, generator=g, device=self._device) * (OWN / d**0.5)
        factor: Tensor = self._shared[side] @ mix + own
        return factor

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed((self._seed << 20) + number + 2)
