"""Residual networks from weights files: names, shapes, real weights, and refusals."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from share_client.backbone_config import BackboneConfig
from share_client.backbones import Backbone, ImageBackbone, load_backbone
from share_client.backbones.resnet import ResNet
from share_core.errors import ConfigError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def saved(name: str, folder: Path, prefix: str = "module.", head: str = "linear") -> Path:
    """Return a weights file as people share them: nested, with DataParallel's prefix and a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = ResNet(name)
    tensors = {f"{prefix}{key}": value for key, value in module.state_dict().items() if "num_batches" not in key}
    tensors[f"{prefix}{head}.weight"] = torch.zeros(10, module.width)
    path = folder / f"{name}.th"
    torch.save({"state_dict": tensors, "best_prec1": 90.0}, path)
    return path


@pytest.mark.parametrize(
    ("name", "prefix", "head", "sites", "width"),
    [("resnet20", "module.", "linear", 18, 64), ("resnet18", "", "fc", 16, 512), ("resnet50", "", "fc", 48, 2048)],
)
def test_the_sites_are_the_convolutions_of_the_blocks(
    tmp_path: Path, name: str, prefix: str, head: str, sites: int, width: int
) -> None:
    config = BackboneConfig(name, weights=saved(name, tmp_path, prefix, head), image=(3, 32, 32))
    backbone = load_backbone(config, "cpu")
    assert isinstance(backbone, ImageBackbone)
    assert (len(backbone.sites), backbone.width) == (sites, width)
    for site, weight in backbone.site_weights().items():
        conv = backbone.module.get_submodule(site)
        assert isinstance(conv, nn.Conv2d)
        assert weight.shape == (conv.out_channels, conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1])
    if name == "resnet20":
        some = load_backbone(BackboneConfig(name, weights=config.weights, sites=("conv2",)), "cpu")
        assert {site.rpartition(".")[2] for site in some.sites} == {"conv2"}


def test_names_are_those_of_torchvision() -> None:
    names = set(ResNet("resnet18").state_dict())
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_mean", "layer4.1.bn2.bias"} <= names
    assert sum(p.numel() for p in ResNet("resnet18").parameters()) == 11_689_512 - 513_000
    assert sum(p.numel() for p in ResNet("resnet50").parameters()) == 25_557_032 - 2_049_000


def test_real_weights_name_real_images() -> None:
    """ResNet-20 of CIFAR-10 with its own classifier: eight of ten test images, which JPEG has harmed."""
    weights, images = DATA / "backbones" / "resnet20-12fca82f.th", DATA / "image" / "cifar10_jpeg.npz"
    if not weights.is_file() or not images.is_file():
        pytest.skip("needs ../shared/data")
    image = pytest.importorskip("PIL.Image", reason="needs pillow for JPEG")
    backbone = load_backbone(BackboneConfig("resnet20", weights=weights), "cpu")
    archive = np.load(images)
    ends = np.cumsum(archive["test_len"])[:300]
    starts = np.concatenate([[0], ends[:-1]])
    blob = archive["test_blob"]
    pixels = [np.asarray(image.open(io.BytesIO(blob[a:b].tobytes()))) for a, b in zip(starts, ends, strict=True)]
    x = torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2) / 255
    state: Any = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    scores = backbone.features({"pixels": x}) @ state["module.linear.weight"].T + state["module.linear.bias"]
    labels = torch.tensor(archive["test_y"][:300].astype(np.int64))
    assert (scores.argmax(dim=1) == labels).double().mean() > 0.8


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), "missing bn1.bias, bn1.running_mean"),
        (lambda path: torch.save(nn.Linear(2, 2), path), "weights_only=True"),
        (lambda path: path.write_bytes(b"nothing"), "cannot read them"),
        (lambda path: torch.save([1, 2], path), "expected a state dict of tensors, got list"),
    ],
)
def test_a_broken_weights_file_is_refused(tmp_path: Path, break_it: Any, words: str) -> None:
    path = tmp_path / "w.th"
    break_it(path)
    with pytest.raises(ConfigError, match=words):
        load_backbone(BackboneConfig("resnet20", weights=path), "cpu")


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    module = ResNet("resnet20")
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    save_file({**tensors, "conv1.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "w.safetensors")
    config = BackboneConfig("resnet20", weights=tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"conv1\.weight: expected shape \(16, 3, 3, 3\), got \(8, 3, 3, 3\)"):
        load_backbone(config, "cpu")
    with pytest.raises(ConfigError, match="resnet56: key weights is missing"):
        load_backbone("resnet56", "cpu")


# Backbones of other people's code.


def make_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))


def make_backbone() -> Backbone:
    return load_backbone("digits-vit", "cpu")


def make_number() -> int:
    return 3


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the import path of this module."""
    import sys

    monkeypatch.setitem(sys.modules, "made_here", sys.modules[__name__])
    return "made_here"


def test_any_module_by_import_path(here: str) -> None:
    config = BackboneConfig(f"{here}:make_net", sites=("0", "3"), image=(1, 8, 8))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    backbone = load_backbone(config, "cpu")
    assert torch.equal(torch.rand(1), expected)
    assert isinstance(backbone, ImageBackbone)
    assert (backbone.sites, backbone.width, backbone.image_shape) == (("0", "3"), 5, (1, 8, 8))
    assert {site: tuple(w.shape) for site, w in backbone.site_weights().items()} == {"0": (4, 9), "3": (5, 36)}
    assert load_backbone(f"{here}:make_backbone", "cpu").name == "digits-vit"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BackboneConfig("no_such_module_here:f"), "there is no module 'no_such_module_here'"),
        (BackboneConfig("math:f"), "module 'math' has no 'f'"),
        (BackboneConfig("math:pi"), "expected a function without arguments, got float"),
        (BackboneConfig("made_here:make_number"), r"expected it to return a torch\.nn\.Module, got int"),
        (BackboneConfig("made_here:make_net"), "key sites is missing"),
        (BackboneConfig("made_here:make_net", sites=("0",)), "key image is missing"),
        (BackboneConfig("made_here:make_net", sites=("0",), image=(2, 8, 8)), "fails on one black image"),
        (BackboneConfig("made_here:make_backbone", sites=("0",)), "returns a whole Backbone"),
        (BackboneConfig("digits-vit", quantised="4bit"), "digits-vit: quantised: has no meaning"),
        (BackboneConfig("timm:resnet18"), "timm:resnet18: key weights is missing: nothing is downloaded"),
    ],
)
def test_what_cannot_be_loaded_says_why(here: str, config: BackboneConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_backbone(config, "cpu")


def test_timm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "w.th").write_bytes(b"")
    with pytest.raises(ConfigError, match="needs timm and a torchvision built for this torch: pip install"):
        load_backbone(BackboneConfig("timm:resnet18", weights=tmp_path / "w.th"), "cpu")


def test_a_model_of_timm(tmp_path: Path) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    torch.save(module.state_dict(), tmp_path / "w.th")
    backbone = load_backbone(BackboneConfig("timm:vit_tiny_patch16_224", weights=tmp_path / "w.th"), "cpu")
    assert (len(backbone.sites), backbone.width) == (12, 192)
