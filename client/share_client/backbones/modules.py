"""Any module that maps pixels to feature vectors, as a backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from share_client.backbones.backbone import Batch, ImageBackbone, choose_device, freeze
from share_client.backbones.sites import choose_sites
from share_core.errors import ConfigError


class ModuleBackbone(ImageBackbone):
    """A module called with pixels; its output (rows, width) are the features, a map (rows, width, h, w) is averaged."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        sites: Sequence[str] | str,
        image_shape: tuple[int, int, int],
        device: str,
    ) -> None:
        self.name = name
        self.device = choose_device(device)
        self.image_shape = image_shape
        self.sites = choose_sites(module, sites, f"backbone {name}")
        self.module = freeze(module, self.device)
        self.width = self._width()

    def features(self, batch: Batch) -> Tensor:
        """Return features (rows, width) of ``batch["pixels"]`` (rows, channels, height, width) in [0, 1]."""
        out: Tensor = self.module(self.prepared(batch["pixels"]))
        return out.mean(dim=(2, 3)) if out.ndim == 4 else out

    def prepared(self, pixels: Tensor) -> Tensor:
        """Return pixels as the module wants them."""
        return pixels

    def _width(self) -> int:
        """Return the length of a feature vector, from one black image.

        Raises:
            ConfigError: the module does not take such an image, or returns something else than vectors.
        """
        where = f"backbone {self.name}: image = {list(self.image_shape)}"
        try:
            with torch.inference_mode():
                out = self.features({"pixels": torch.zeros(1, *self.image_shape, device=self.device)})
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{where}: the model fails on one black image: {error}") from error
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != 1:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ConfigError(f"{where}: expected features (rows, width) for one black image, got {got}")
        return int(out.shape[1])
