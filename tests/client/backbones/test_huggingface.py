"""Hugging Face directories: sites by PEFT's own choice, vision encoders, quantised loading, refusals."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from share_client.backbone_config import BackboneConfig
from share_client.backbones import ImageBackbone, TextBackbone, huggingface, load_backbone, sites
from share_client.backbones.sites import choose_sites
from share_client.training.factors import FixedFactors
from share_client.training.inject import adapted, injected
from share_core.errors import ConfigError

peft = pytest.importorskip("peft", reason="PEFT's own choice is compared with")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "llama", "distilbert"])
def test_the_sites_are_those_that_peft_adapts(save_model: Callable[[str], Path], model_type: str) -> None:
    backbone = load_backbone(str(save_model(model_type)), "cpu")
    assert isinstance(backbone, TextBackbone)
    targets = None if model_type != "distilbert" else ["q_lin", "v_lin"]
    model = peft.get_peft_model(backbone.module, peft.LoraConfig(target_modules=targets))
    theirs = {path.removeprefix("base_model.model.").removesuffix(".lora_A.default") for path in lora_paths(model)}
    model.unload()
    assert set(backbone.sites) == theirs
    assert len(backbone.sites) == (2 if model_type == "gpt2" else 4)
    rows = backbone.tokenize(["red blue", "blue"], None, 4)
    assert backbone.features(backbone.collate(rows)).shape == (2, 16)
    shapes = {tuple(weight.shape) for weight in backbone.site_weights().values()}
    assert shapes == ({(48, 16)} if model_type == "gpt2" else {(16, 16)})


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "llama", "distilbert"])
def test_a_row_fits_as_far_as_positions_are_counted(save_model: Callable[[str], Path], model_type: str) -> None:
    backbone = load_backbone(str(save_model(model_type)), "cpu")
    assert isinstance(backbone, TextBackbone)

    def features(tokens: int) -> torch.Tensor:
        ones = torch.ones(1, tokens, dtype=torch.int64)
        return backbone.features({"input_ids": 3 * ones, "attention_mask": ones})

    if model_type == "llama":
        assert backbone.positions is None
        return
    assert backbone.positions is not None
    assert features(backbone.positions).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        features(backbone.positions + 1)


def test_positions_that_count_those_of_padding_are_caught(save_model: Callable[[str], Path]) -> None:
    with mock.patch.object(huggingface, "positions_of", lambda module: module.config.max_position_embeddings):
        test_a_row_fits_as_far_as_positions_are_counted(save_model, "bert")
        with pytest.raises((IndexError, RuntimeError)):
            test_a_row_fits_as_far_as_positions_are_counted(save_model, "roberta")


def lora_paths(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules() if path.endswith(".lora_A.default")]


PARTS = st.sampled_from(["a", "b", "ab", "a.b", "b.a", r".*\.a", r"x\.[ab]", "x", r".*b"])


@settings(max_examples=60, deadline=None)
@given(st.one_of(PARTS, st.lists(PARTS, min_size=1, max_size=3)))
def test_names_are_matched_as_peft_matches_them(targets: Any) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=targets)
    for path in ("a", "b", "ab", "x.a", "x.b", "x.ab", "x.a.b", "ba.b"):
        theirs = bool(check_target_module_exists(config, path))
        assert sites._meant(path, nn.Linear(1, 1), targets) == theirs


def test_all_linear_is_every_linear_map() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 1)))
    assert choose_sites(net, "all-linear", "here") == ("0", "2.0")
    with pytest.raises(ConfigError, match=r"here: sites: expected modules matching q, v, found none.*called 0, 2\.0"):
        choose_sites(net, ["q", "v"], "here")
    with pytest.raises(ConfigError, match="site '1' is ReLU"):
        choose_sites(net, ["1"], "here")


def test_a_vision_encoder_takes_images_of_its_processor(save_model: Callable[[str], Path]) -> None:
    backbone = load_backbone(str(save_model("vit")), "cpu")
    assert isinstance(backbone, ImageBackbone)
    assert (backbone.image_shape, backbone.width) == ((3, 8, 8), 16)
    assert len(backbone.sites) == 4
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    normalised = {"pixel_values": (pixels - 0.5) / 0.5}
    expected = backbone.module(**normalised).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(backbone.features({"pixels": pixels}), expected)


def test_an_encoder_without_query_and_value_needs_sites(save_model: Callable[[str], Path]) -> None:
    folder = str(save_model("resnet"))
    with pytest.raises(ConfigError, match=r"sites: expected modules matching query, value.* found none; modules here"):
        load_backbone(folder, "cpu")
    backbone = load_backbone(BackboneConfig(folder, sites=r"encoder\..*\.convolution"), "cpu")
    assert backbone.width == 16
    assert {len(weight.shape) for weight in backbone.site_weights().values()} == {2}


@pytest.mark.parametrize("model_type", ["t5", "clip"])
@pytest.mark.parametrize("takes", ["token ids", "pixels"])
def test_a_model_that_wants_more_than_a_backbone_gets_is_refused(
    save_model: Callable[[str], Path], tmp_path: Path, model_type: str, takes: str
) -> None:
    folder = save_model(model_type)
    if takes == "pixels":
        folder = Path(shutil.copytree(folder, tmp_path / model_type))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        shutil.copy(save_model("vit") / "preprocessor_config.json", folder)
    name = {"t5": "T5Model", "clip": "CLIPModel"}[model_type]
    words = (
        rf"{folder.name}: expected .*hidden states of {takes}.* alone .*, got {name}, which fails on one small row: "
    )
    with pytest.raises(ConfigError, match=words):
        load_backbone(str(folder), "cpu")


def test_images_that_the_model_does_not_take_are_refused(save_model: Callable[[str], Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"pixels \[3, 16, 16\] alone .*, got ViTModel, which fails .*: Input image size"
    ):
        load_backbone(BackboneConfig(str(save_model("vit")), image=(3, 16, 16)), "cpu")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_backbone_is_the_matrices_that_its_bits_stand_for(
    save_model: Callable[[str], Path], bits: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised backbones need bitsandbytes")
    folder = str(save_model("wide-bert"))
    backbone, whole = load_backbone(BackboneConfig(folder, quantised=bits), "cpu"), load_backbone(folder, "cpu")
    assert isinstance(backbone, TextBackbone)
    inputs = backbone.collate(backbone.tokenize(["red blue"], None, 4))
    weights = backbone.site_weights()
    for site, weight in whole.site_weights().items():
        assert weights[site].shape == weight.shape
        assert 0 < (weights[site] - weight).abs().max() < 0.02
        with pytest.raises(ConfigError, match="without quantisation"):
            backbone.site(site).as_stored(weight)
    plain = backbone.features(inputs)
    changes = {}
    for site in backbone.sites:
        out, in_ = torch.ones(64, 1, requires_grad=True), torch.eye(64)[:, :1]
        changes[site] = (out, adapted(backbone.site(site), FixedFactors(out, in_)))
    with injected(backbone, {site: module for site, (_, module) in changes.items()}):
        changed = backbone.features(inputs)
    assert (changed - plain).abs().max() > 1e-3
    changed[0, 0].backward()  # type: ignore[no-untyped-call]
    assert all(out.grad is not None and out.grad.abs().max() > 0 for out, _ in changes.values())


def test_quantised_without_bitsandbytes_says_what_to_install(save_model: Callable[[str], Path]) -> None:
    find = importlib.util.find_spec
    hidden = mock.patch("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with hidden, pytest.raises(ConfigError, match="needs bitsandbytes and accelerate: pip install"):
        load_backbone(BackboneConfig(str(save_model("bert")), quantised="4bit"), "cpu")


def test_peft_is_asked_for_where_it_is_missing() -> None:
    with mock.patch.dict(sys.modules, {"peft.utils": None}), pytest.raises(ConfigError, match="needs peft: pip"):
        sites.known_targets("bert")
