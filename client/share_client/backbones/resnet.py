"""Residual networks (arXiv 1512.03385) from a weights file: those for CIFAR and those of torchvision, by name.

Names of modules and parameters are those of the usual weights files: ``akamaster/pytorch_resnet_cifar10`` for depths
20 to 110, torchvision for 18 to 152. The sites are the convolutions of the residual blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from share_client.backbone_config import BackboneConfig
from share_client.backbones.backbone import Backbone
from share_client.backbones.modules import ModuleBackbone
from share_client.backbones.weights import load_weights
from share_core.errors import ConfigError

SITES = r"layer\d+\.\d+\.conv\d"
"""The convolutions of the blocks; not the first one, and not the projections beside blocks."""
_LARGE = {
    "resnet18": ((2, 2, 2, 2), 1),
    "resnet34": ((3, 4, 6, 3), 1),
    "resnet50": ((3, 4, 6, 3), 4),
    "resnet101": ((3, 4, 23, 3), 4),
    "resnet152": ((3, 8, 36, 3), 4),
}
"""Blocks of each stage, and how many times wider a block's output is than its inside."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixels that all these weights were trained with."""


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a path around them."""

    def __init__(self, into: int, inside: int, stride: int, around: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, inside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.downsample = around

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, into, h, w) to (rows, inside, h / stride, w / stride)."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    """A 3 x 3 convolution between two of 1 x 1, and a path around them; torchvision strides in the middle."""

    def __init__(self, into: int, inside: int, stride: int, around: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, 4 * inside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * inside)
        self.downsample = around

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, into, h, w) to (rows, 4 inside, h / stride, w / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class _PadChannels(nn.Module):
    """Every second pixel, with zeros in the new channels: the path around a block that has no weights."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, c, h, w) to (rows, c + more, h / 2, w / 2)."""
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class ResNet(nn.Module):
    """The network up to its pooled features; pixels in [0, 1] are normalised inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        small = name not in _LARGE
        blocks, wider = (((int(name.removeprefix("resnet")) - 2) // 6,) * 3, 1) if small else _LARGE[name]
        first = 16 if small else 64
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, first, *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages = [f"layer{stage}" for stage in range(1, len(blocks) + 1)]
        width = first
        for stage, (name_, count) in enumerate(zip(self.stages, blocks, strict=True)):
            inside = first * 2**stage
            self.add_module(name_, _stage(width, inside, wider, count, 1 if stage == 0 else 2, small))
            width = inside * wider
        self.width = width

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (rows, width) of pixels (rows, 3, h, w) in [0, 1]."""
        x = self.pool(torch.relu(self.bn1(self.conv1((pixels - self.mean) / self.std))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        features: Tensor = x.mean(dim=(2, 3))
        return features


def _stage(into: int, inside: int, wider: int, count: int, stride: int, small: bool) -> nn.Sequential:
    """Return the blocks of one resolution; the first halves it where ``stride`` is 2."""
    make, out = (_Bottleneck, 4 * inside) if wider == 4 else (_Block, inside)
    around: nn.Module | None = None
    if into != out or stride != 1:
        projection = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        around = _PadChannels(out - into) if small else projection
    return nn.Sequential(make(into, inside, stride, around), *(make(out, inside, 1, None) for _ in range(count - 1)))


def load(config: BackboneConfig, device: str) -> Backbone:
    """Return a network by name with the weights of a file; its classifier, ``fc`` or ``linear``, is left out.

    Raises:
        ConfigError: ``weights`` is missing or does not fit.
    """
    if config.weights is None:
        raise ConfigError(f'backbone {config.model}: key weights is missing; add weights = "FILE" to [backbone]')
    with torch.random.fork_rng(devices=[]):
        module = ResNet(config.model)
    load_weights(module, config.weights, without=("fc.", "linear."))
    side = 224 if config.model in _LARGE else 32
    return ModuleBackbone(config.model, module, config.sites or SITES, config.image or (3, side, side), device)
