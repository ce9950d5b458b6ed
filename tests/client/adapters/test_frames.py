"""How a backbone stores a weight is found by the fingerprint alone, and another backbone fits in no way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import share_client.frames
from share_client.backbones import load_backbone
from share_client.frames import read_frame
from share_core.errors import ConfigError, SpaceMismatchError
from share_core.fingerprint import describe_space


def matrix_of(kind: str, weight: Tensor) -> Tensor:
    """Return the matrix to which ``B A`` is added, as PEFT has it."""
    return weight.T if kind == "conv1d_transposed" else weight.flatten(1)


shapes = st.one_of(
    st.tuples(st.sampled_from(["linear", "conv1d_transposed"]), st.lists(st.integers(1, 6), min_size=2, max_size=2)),
    st.tuples(st.just("conv"), st.lists(st.integers(1, 4), min_size=3, max_size=5)),
)


@settings(max_examples=40, deadline=None)
@given(stored=st.lists(shapes, min_size=1, max_size=3), seed=st.integers(0, 99), prefix=st.sampled_from(["", "bert."]))
def test_layout_and_module_are_found(
    stored: list[tuple[str, list[int]]], seed: int, prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = {f"layer.{n}.map": torch.randn(shape, generator=draw) for n, (_, shape) in enumerate(stored)}
    kinds = {name: kind for name, (kind, _) in zip(weights, stored, strict=True)}
    path = tmp_path_factory.mktemp("backbone") / "model.safetensors"
    save_file({f"{prefix}{name}.weight": weight for name, weight in weights.items()}, path)
    spec = describe_space("any", {name: matrix_of(kinds[name], weight) for name, weight in weights.items()})
    frame = read_frame(str(path), spec, spec.sites)
    for name, site in frame.sites.items():
        assert (site.module, site.weight_shape) == (f"{prefix}{name}", tuple(weights[name].shape))
        # A matrix that equals its own transpose is stored in both ways at once.
        assert torch.equal(matrix_of(site.kind, weights[name]), matrix_of(kinds[name], weights[name]))


@pytest.fixture
def square(tmp_path: Path) -> tuple[Path, Tensor]:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    save_file({"map.weight": weight}, tmp_path / "model.safetensors")
    return tmp_path, weight


def test_a_square_weight_is_told_from_its_transpose(square: tuple[Path, Tensor]) -> None:
    path, weight = square
    for matrix, kind in ((weight, "linear"), (weight.T, "conv1d_transposed")):
        frame = read_frame(str(path), describe_space("any", {"map": matrix}), ["map"])
        assert frame.sites["map"].kind == kind


def test_the_fingerprint_and_not_the_shape_decides(
    square: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the first layout of the right shape is taken."""
    path, weight = square
    spec = describe_space("any", {"map": weight.T})
    monkeypatch.setattr(
        share_client.frames, "_layout", lambda site, stored: next(iter(share_client.frames._layouts(site, stored)))
    )
    assert read_frame(str(path), spec, ["map"]).sites["map"].kind == "linear"


def test_another_backbone_is_refused(square: tuple[Path, Tensor]) -> None:
    path, weight = square
    for other, words in (
        (weight + 1, "the space has fingerprint"),
        (torch.ones(4, 5), "the space has 4 x 5, this backbone 4 x 4"),
    ):
        with pytest.raises(SpaceMismatchError, match=words):
            read_frame(str(path), describe_space("any", {"map": other}), ["map"])
    with pytest.raises(SpaceMismatchError, match=r"holds 0 weights named 'else\.weight'.*over 'any'"):
        read_frame(str(path), describe_space("any", {"else": weight}), ["else"])
    with pytest.raises(ConfigError):
        read_frame(str(path / "nowhere"), describe_space("any", {"map": weight}), ["map"])


def test_a_backbone_without_files_of_its_own_is_loaded() -> None:
    loaded = load_backbone("digits-vit", "cpu")
    spec = describe_space("digits-vit", loaded.site_weights())
    frame = read_frame("digits-vit", spec, spec.sites)
    assert frame.path is None
    assert {site.kind for site in frame.sites.values()} == {"linear"}
    other = describe_space("other", {name: weight + 1 for name, weight in loaded.site_weights().items()})
    with pytest.raises(SpaceMismatchError, match="the space has fingerprint"):
        read_frame("digits-vit", other, other.sites)
