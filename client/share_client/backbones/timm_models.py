"""Models of timm by name, with weights from a file: ``model = "timm:NAME"``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from share_client.backbone_config import BackboneConfig
from share_client.backbones.backbone import Backbone
from share_client.backbones.modules import ModuleBackbone
from share_client.backbones.weights import load_weights
from share_core.errors import ConfigError

SITES = ("qkv", "q_proj", "v_proj", "conv1", "conv2", "conv3")
"""Attention maps of transformers, convolutions of residual blocks."""


class TimmBackbone(ModuleBackbone):
    """A model without its classifier; pixels in [0, 1] are normalised as the model's own configuration says."""

    def __init__(self, config: BackboneConfig, module: nn.Module, device: str) -> None:
        cfg = module.pretrained_cfg
        assert isinstance(cfg, dict)
        self._mean, self._std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
        channels, height, width = config.image or cfg["input_size"]
        super().__init__(config.model, module, config.sites or SITES, (channels, height, width), device)

    def prepared(self, pixels: Tensor) -> Tensor:
        """Return normalised pixels."""
        return (pixels - self._mean.to(pixels)) / self._std.to(pixels)


def load(config: BackboneConfig, device: str) -> Backbone:
    """Make the model and fill it from the file.

    Raises:
        ConfigError: timm is missing or does not know the name, or there are no weights.
    """
    name = config.model.removeprefix("timm:")
    if config.weights is None:
        raise ConfigError(
            f"backbone {config.model}: key weights is missing: nothing is downloaded; save the model's state_dict() "
            'and add weights = "FILE" to [backbone]'
        )
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        # timm imports torchvision, whose release for another build of torch fails with RuntimeError.
        raise ConfigError(
            f"backbone {config.model} needs timm and a torchvision built for this torch: pip install timm torchvision "
            f"({type(error).__name__}: {error})"
        ) from error
    try:
        with torch.random.fork_rng(devices=[]):
            module = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"backbone {config.model}: timm has no such model: {error}") from error
    load_weights(module, config.weights, without=("fc.", "head.fc.", "classifier."))
    return TimmBackbone(config, module, device)
