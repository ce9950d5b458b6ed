"""Putting trainable or fixed changes beside the frozen weights of a backbone, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.training.factors import SiteFactors


class AdaptedLinear(nn.Module):
    """``y = base(x) + (x @ in_) @ out.T``: the frozen map plus the change, which is never formed as a matrix."""

    def __init__(self, base: nn.Linear, change: SiteFactors) -> None:
        super().__init__()
        self.base = base
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        out, in_ = self.change.factors()
        y: Tensor = self.base(x) + (x @ in_) @ out.T
        return y


class ProbedLinear(nn.Module):
    """The frozen map plus a zero matrix, whose gradient is that of the frozen weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.change = nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        y: Tensor = self.base(x) + nn.functional.linear(x, self.change)
        return y


@contextmanager
def injected(backbone: Backbone, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the linear maps at the given sites while the context lasts.

    The original modules are put back however the context ends; they are never written to, so that one backbone
    serves any number of tasks.
    """
    originals = {site: backbone.linear(site) for site in modules}
    try:
        for site, module in modules.items():
            _place(backbone.module, site, module)
        yield
    finally:
        for site, original in originals.items():
            _place(backbone.module, site, original)


def _place(root: nn.Module, site: str, module: nn.Module) -> None:
    parent, _, name = site.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
