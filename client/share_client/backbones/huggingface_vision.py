"""Any Hugging Face vision encoder directory as an image backbone, offline: mean over patches or pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_client.backbone_config import BackboneConfig
from share_client.backbones.backbone import Batch, ImageBackbone, choose_device, freeze
from share_client.backbones.huggingface import load_model, targets_of, width_of
from share_client.backbones.sites import choose_sites
from share_core.errors import ConfigError


class HuggingFaceVisionBackbone(ImageBackbone):
    """An encoder that takes ``pixel_values``, normalised and sized as its image processor says."""

    def __init__(self, config: BackboneConfig, device: str = "auto") -> None:
        directory = Path(config.model)
        self.name = directory.name
        self.device = choose_device(device)
        module = load_model(directory, config.quantised, self.device)
        processor = _processor(directory)
        self.module = module if config.quantised else freeze(module, self.device)
        channels = int(getattr(module.config, "num_channels", 3))
        self.image_shape = config.image or (channels, *_size(processor, directory))
        plain = not getattr(processor, "do_normalize", True)
        mean, std = (0.0, 1.0) if plain else (processor.image_mean, processor.image_std)
        self._mean, self._std = (torch.tensor(value, device=self.device).view(-1, 1, 1) for value in (mean, std))
        black = torch.zeros(1, *self.image_shape, device=self.device)
        self.width = width_of(self, {"pixels": black}, f"pixels {list(self.image_shape)}", "ViT, ConvNeXt")
        self.sites = choose_sites(module, config.sites or targets_of(module), f"backbone {self.name}")

    def features(self, batch: Batch) -> Tensor:
        """Return the mean of the last hidden states (rows, width) of ``batch["pixels"]`` (rows, c, h, w) in [0, 1]."""
        pixels = (batch["pixels"] - self._mean) / self._std
        hidden: Tensor = self.module(pixel_values=pixels).last_hidden_state
        return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden.mean(dim=1)


def _processor(directory: Path) -> Any:
    from transformers import AutoImageProcessor

    load: Any = AutoImageProcessor.from_pretrained
    try:
        return load(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"backbone {directory}: transformers cannot load its image processor: {error}") from error


def _size(processor: Any, directory: Path) -> tuple[int, int]:
    """Return height and width of the images that come out of the processor."""
    cropped = getattr(processor, "do_center_crop", False)
    size = dict((processor.crop_size if cropped else processor.size) or {})
    if {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    raise ConfigError(
        f"backbone {directory}: its image processor gives no height and width, only {size}; add "
        "image = [channels, height, width] to [backbone]"
    )
