"""Putting trainable or fixed changes beside the frozen weights of a backbone, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.backbones.places import Place
from share_client.training.factors import FixedFactors, SiteFactors
from share_core.types import Factors


class AdaptedLinear(nn.Module):
    """``y = base(x) + (x @ in_) @ out.T``: the frozen map plus the change, which is never formed as a matrix."""

    def __init__(self, base: nn.Module, change: SiteFactors) -> None:
        super().__init__()
        self.base = base
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        out, in_ = self.change.factors()
        y: Tensor = self.base(x) + (x @ in_) @ out.T
        return y


class AdaptedConv(nn.Module):
    """A frozen convolution plus ``in_`` as one to r channels, followed by ``out`` at every position.

    ``in_`` (channels * kernel, r) is laid out as the rows of the weight are, so the two together are the convolution
    with ``out @ in_.T`` as its weight. PEFT's ``lora_A`` and ``lora_B`` of a convolution have the same layout.
    """

    def __init__(self, base: nn.Module, change: SiteFactors) -> None:
        super().__init__()
        self.base = base
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, channels, ...) to (rows, d_out, ...)."""
        out, in_ = self.change.factors()
        z = _convolved(self.base, x, in_.T)
        change = out @ z.flatten(2)
        y: Tensor = self.base(x) + change.reshape(*change.shape[:2], *z.shape[2:])
        return y


class ProbedLinear(nn.Module):
    """A map plus a zero matrix (d_out, d_in), whose gradient is that of the frozen weight as a matrix.

    The map is the frozen one, or the frozen one with a given change.
    """

    def __init__(self, place: Place, fixed: SiteFactors | None) -> None:
        super().__init__()
        self.frozen = place.module
        self.base = place.module if fixed is None else adapted(place, fixed)
        zeros = torch.zeros(place.d_out, place.d_in, dtype=place.compute_dtype(), device=place.device)
        self.change = nn.Parameter(zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        y: Tensor = self.base(x) + nn.functional.linear(x, self.change)
        return y


class ProbedConv(ProbedLinear):
    """The same for a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, channels, ...) to (rows, d_out, ...)."""
        y: Tensor = self.base(x) + _convolved(self.frozen, x, self.change)
        return y


def adapted(base: Place, change: SiteFactors) -> AdaptedLinear | AdaptedConv:
    """Return the module that computes what ``base`` would with ``out @ in_.T`` added to its weight as a matrix."""
    return AdaptedConv(base.module, change) if base.kind == "conv" else AdaptedLinear(base.module, change)


def probed(base: Place, fixed: SiteFactors | None = None) -> ProbedLinear:
    """Return the module that computes what ``base`` and ``fixed`` do, with the weight's gradient in ``change``."""
    return ProbedConv(base, fixed) if base.kind == "conv" else ProbedLinear(base, fixed)


def fixed_factors(base: Place, factors: Factors) -> FixedFactors:
    """Return given factors where ``base`` is and in the type that it computes in."""
    return FixedFactors(*(part.to(base.device, base.compute_dtype()) for part in (factors.out, factors.in_)))


def _convolved(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution with stride, padding and dilation of ``base`` but rows (n, d_in) as its weight."""
    kernel, convolve = base.weight, base._conv_forward
    assert isinstance(kernel, Tensor)
    assert callable(convolve)
    z: Tensor = convolve(x, weight.reshape(-1, *kernel.shape[1:]), None)
    return z


@contextmanager
def injected(backbone: Backbone, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules at the given sites while the context lasts.

    The original modules are put back however the context ends; they are never written to, so that one backbone
    serves any number of tasks.
    """
    originals = {site: backbone.site(site).module for site in modules}
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
