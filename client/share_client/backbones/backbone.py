"""What training asks of a backbone: a frozen encoder with named adaptable matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from share_client.backbones.places import Place, place_of
from share_core.errors import ConfigError

Batch = Mapping[str, Tensor]
"""Inputs of one step by name, rows first."""


class Backbone(ABC):
    """A frozen encoder. Training injects adapters at its sites and takes them out again; it never changes it."""

    name: str
    """For people; the identity is the fingerprint of :meth:`site_weights`."""
    module: nn.Module
    """Frozen, in evaluation mode, on :attr:`device`."""
    sites: tuple[str, ...]
    """Module paths of the adapted linear maps and convolutions inside :attr:`module`."""
    width: int
    """Length of one row's feature vector."""
    device: torch.device
    """Where the module lives."""

    def site_weights(self) -> dict[str, Tensor]:
        """Return the frozen weight of every site as a matrix (d_out, d_in), by name, on the CPU."""
        return {site: self.site(site).matrix().detach().to("cpu") for site in self.sites}

    def site(self, site: str) -> Place:
        """Return the frozen module at a site, with the shape of its weight as a matrix.

        Raises:
            ConfigError: the module there cannot be adapted.
        """
        return place_of(site, self.module.get_submodule(site))

    @abstractmethod
    def features(self, batch: Batch) -> Tensor:
        """Return features (rows, width) of a batch that is on :attr:`device`."""


class ImageBackbone(Backbone):
    """A backbone that takes ``batch["pixels"]`` (rows, channels, height, width)."""

    image_shape: tuple[int, int, int]
    """(channels, height, width) it was made for."""


class TextBackbone(Backbone):
    """A backbone that takes ``input_ids`` and ``attention_mask`` (rows, tokens)."""

    @abstractmethod
    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> list[dict[str, list[int]]]:
        """Return the unpadded token columns of every row, cut to ``max_length`` tokens."""

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Return a batch on the CPU, padded to its longest row."""


def choose_device(device: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: another word, or ``cuda`` where torch sees none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device: expected a CUDA device, torch sees none; use device = "auto" or "cpu"')
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def freeze(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module on ``device``, in evaluation mode, with no parameter asking for a gradient."""
    module.to(device)
    module.eval()
    return module.requires_grad_(False)
