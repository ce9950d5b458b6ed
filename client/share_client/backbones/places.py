"""The modules of a model that can be adapted, and how each of them takes a change of its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from share_core.errors import ConfigError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Place:
    """One adapted module."""

    site: str
    """Its name in the space."""
    module: nn.Module
    """``nn.Linear``, a convolution, or the ``Conv1D`` of transformers."""
    kind: str
    """``linear``, ``conv1d_transposed`` or ``conv``, as :class:`share_core.peft.export.PeftSite` has them."""
    d_out: int
    """Rows of the weight as a matrix."""
    d_in: int
    """Columns of the weight as a matrix; of a convolution, channels times kernel."""

    def matrix(self) -> Tensor:
        """Return the weight as a matrix (d_out, d_in); of a quantised one, what it stands for.

        Raises:
            ConfigError: the weight is stored in a way that PEFT does not know.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if self.quantised:
            weight = _dequantised(self.module)
        if not weight.is_floating_point() or weight.numel() != self.d_out * self.d_in:
            raise ConfigError(
                f"site {self.site!r}: its weight is stored as {weight.dtype} of shape {tuple(weight.shape)}, expected "
                f"{self.d_out} x {self.d_in} floating-point numbers: load the backbone without quantisation for this"
            )
        return weight.T if self.kind == "conv1d_transposed" else weight.reshape(self.d_out, self.d_in)

    @property
    def quantised(self) -> bool:
        """Whether the weight is stored in fewer bits than a floating-point number has."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return not weight.is_floating_point()

    def compute_dtype(self) -> torch.dtype:
        """Return the type of the module's inputs; a quantised weight does not say, and its bias may not either."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the module lives."""
        return next(self.module.parameters()).device

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix (d_out, d_in) in the shape and dtype of the weight.

        Raises:
            ConfigError: the weight is stored quantised.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if self.quantised:
            raise ConfigError(
                f"site {self.site!r}: its weight is stored as {weight.dtype}, which takes no change: load the backbone "
                "without quantisation for this"
            )
        shaped = matrix.T if self.kind == "conv1d_transposed" else matrix.reshape(weight.shape)
        return shaped.to(weight.dtype).contiguous()


def place_of(site: str, module: nn.Module) -> Place:
    """Return the place that a module is.

    Raises:
        ConfigError: its change cannot be put beside it: an embedding, a grouped convolution, the output map inside
            ``nn.MultiheadAttention``, or another module.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ConfigError(
            f"site {site!r} is the output map inside nn.MultiheadAttention, which reads its weight without calling it: "
            "use a backbone whose attention is made of linear layers"
        )
    if isinstance(module, nn.Linear):  # quantised ones are its subclasses, and their weights have other shapes
        return Place(site, module, "linear", module.out_features, module.in_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        d_in, d_out = (int(n) for n in module.weight.shape)  # type: ignore[union-attr]
        return Place(site, module, "conv1d_transposed", d_out, d_in)
    if isinstance(module, CONVOLUTIONS) and module.groups == 1:
        weight = module.weight
        return Place(site, module, "conv", int(weight.shape[0]), int(weight[0].numel()))
    what = "a grouped convolution" if isinstance(module, CONVOLUTIONS) else type(module).__name__
    raise ConfigError(
        f"site {site!r} is {what}: only linear layers, Conv1D and convolutions without groups can be adapted; "
        "choose other sites, or export the task and load it with PEFT"
    )


def _dequantised(module: nn.Module) -> Tensor:
    try:
        from peft.utils.integrations import dequantize_module_weight
    except ImportError as error:
        raise ConfigError("quantised backbones need peft: pip install 'fedshare[text]'") from error
    kept = module.weight
    weight: Tensor = dequantize_module_weight(module)
    # On a CPU PEFT puts a copy in its place, which in 8 bits lacks the scales once a pass went through the module.
    module.weight = kept
    return weight
