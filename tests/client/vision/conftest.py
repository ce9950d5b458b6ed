"""Backbones for shapes, pretrained here in seconds, and tables of shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from share_client.backbone_config import BackboneConfig
from share_client.backbones import Backbone, load_backbone
from share_client.tasks_file import TaskConfig


@pytest.fixture(scope="session")
def encoder_config(tmp_path_factory: pytest.TempPathFactory) -> BackboneConfig:
    """An encoder of solids that has seen boxes and slabs."""
    pytest.importorskip("PIL", reason="images are written by pillow")
    from share_simulations.pretrain_shapes import pretrain_encoder, save_encoder

    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(pretrain_encoder(120, batch_size=32).module, path)
    return BackboneConfig(
        "share_simulations.pretrain_shapes:make_encoder",
        weights=path,
        sites=("conv2", "conv3", "conv4", "project"),
        image=(3, 24, 24),
    )


@pytest.fixture(scope="session")
def encoder(encoder_config: BackboneConfig) -> Backbone:
    return load_backbone(encoder_config, "cpu")


@pytest.fixture(scope="session")
def denoiser_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory whose denoiser has seen squares and discs on white."""
    pytest.importorskip("PIL", reason="images are written by pillow")
    pytest.importorskip("diffusers", reason="denoisers need diffusers")
    from share_simulations.pretrain_shapes import pretrain_denoiser, save_denoiser

    folder = tmp_path_factory.mktemp("pipeline") / "denoiser"
    save_denoiser(pretrain_denoiser(50, batch_size=16).module, folder)
    return folder


@pytest.fixture(scope="session")
def denoiser(denoiser_folder: Path) -> Backbone:
    return load_backbone(str(denoiser_folder), "cpu")


@pytest.fixture
def poses(tmp_path: Path) -> Callable[..., TaskConfig]:
    """Return a maker of tasks about a solid."""
    from share_simulations.shapes import write_poses

    def make(kind: str, solid: str, rows: int = 12, test_rows: int = 6, **changes: object) -> TaskConfig:
        write_poses(tmp_path / solid, solid, rows, test_rows, 3)
        files = [tmp_path / solid / f"{split}.jsonl" for split in ("train", "test")]
        return TaskConfig(solid, kind, files[0], files[1], **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def captions(tmp_path: Path) -> TaskConfig:
    """A task of crosses and rings at night."""
    from share_simulations.shapes import write_captions

    write_captions(tmp_path / "night", ("cross", "ring"), 12, 5, 4, dark=True)
    train, test = (tmp_path / "night" / f"{split}.jsonl" for split in ("train", "test"))
    return TaskConfig("night", "text-to-image", train, test)
