"""A small vision transformer for 8 x 8 images, pretrained by :mod:`share_client.backbones.pretrain_digits`.

Its weights ship with the package, because the fingerprint of the space must be the same on every machine. Query, key,
value and projection are separate ``nn.Linear`` modules, so that every site is a plain matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from share_client.backbone_config import BackboneConfig
from share_client.backbones.backbone import Backbone, Batch, ImageBackbone, choose_device, freeze
from share_client.backbones.sites import choose_sites

WIDTH = 64
DEPTH = 4
HEADS = 4
IMAGE = 8
PATCH = 2
WEIGHTS_FILE = "digits-vit.safetensors"
SITES = ("query", "value")


class Attention(nn.Module):
    """Multi-head self-attention over (rows, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, tokens, width) to the same shape."""
        rows, tokens, width = x.shape
        shape = (rows, tokens, self.heads, width // self.heads)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(rows, tokens, width))
        return out


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer map, each with a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, tokens, width) to the same shape."""
        x = x + self.attention(self.norm_attention(x))
        out: Tensor = x + self.contract(nn.functional.gelu(self.expand(self.norm_mlp(x))))
        return out


class DigitsTransformer(nn.Module):
    """Encoder of (rows, 1, 8, 8) images into (rows, 64) features: the mean over the sixteen patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(torch.randn((IMAGE // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (rows, 64) of pixels (rows, 1, 8, 8) in [0, 1]."""
        side = IMAGE // PATCH
        patches = pixels.view(-1, side, PATCH, side, PATCH).transpose(2, 3).reshape(-1, side * side, PATCH * PATCH)
        x = self.patch(2 * patches - 1) + self.position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x).mean(dim=1)
        return out


class DigitsBackbone(ImageBackbone):
    """The packaged ``digits-vit``: sites are query and value of the four blocks, if not others are chosen."""

    def __init__(self, sites: Sequence[str] | str = SITES, device: str = "auto") -> None:
        self.name = "digits-vit"
        self.device = choose_device(device)
        self.image_shape = (1, IMAGE, IMAGE)
        self.width = WIDTH
        # The initial values are overwritten at once; the fork keeps the caller's random numbers untouched.
        with torch.random.fork_rng(devices=[]):
            module = DigitsTransformer()
        with as_file(files("share_client.backbones") / WEIGHTS_FILE) as path:
            module.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        self.sites = choose_sites(module, sites, "backbone digits-vit")
        self.module = freeze(module, self.device)

    def features(self, batch: Batch) -> Tensor:
        """Return features (rows, 64) of ``batch["pixels"]`` (rows, 1, 8, 8)."""
        out: Tensor = self.module(batch["pixels"])
        return out


def load(config: BackboneConfig, device: str) -> Backbone:
    """Return the packaged backbone."""
    return DigitsBackbone(config.sites or SITES, device)
