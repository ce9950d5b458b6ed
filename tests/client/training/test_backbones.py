"""Backbones: shipped weights, their pretraining, sites, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from share_client.backbones import Backbone, load_backbone
from share_client.backbones.backbone import choose_device
from share_client.backbones.diffusion import DiffusionBackbone
from share_client.kind_names import KINDS
from share_client.kinds.fitting import kinds_for
from share_client.tasks_file import TaskConfig
from share_client.training import TrainingOptions, evaluate, prepare_task, train_in_space
from share_core.errors import ConfigError, SpaceMismatchError
from share_core.fingerprint import check_backbone, describe_space
from share_core.space import empty_space, update_adapter
from share_core.spec_file import builtin_spec


def test_shipped_space_fits_the_shipped_weights(backbone: Backbone) -> None:
    assert builtin_spec("digits-vit") == describe_space("digits-vit", backbone.site_weights())


def test_changed_weights_are_refused(backbone: Backbone) -> None:
    weights = backbone.site_weights()
    weights[backbone.sites[0]] = weights[backbone.sites[0]] * 1.01
    with pytest.raises(SpaceMismatchError, match=backbone.sites[0]):
        check_backbone(builtin_spec("digits-vit"), weights)


def test_loading_twice_gives_the_same_weights_and_leaves_random_numbers_alone(backbone: Backbone) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    again = load_backbone("digits-vit", "cpu")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(backbone.site_weights()[s], w) for s, w in again.site_weights().items())


def test_pretraining_learns() -> None:
    pytest.importorskip("sklearn", reason="pretraining needs scikit-learn")
    from share_client.backbones.pretrain_digits import pretrain

    made = pretrain(steps=40, batch_size=16)
    assert made.last_loss < made.first_loss


def test_pretraining_uses_only_its_own_rows() -> None:
    sklearn = pytest.importorskip("sklearn.datasets", reason="pretraining needs scikit-learn")
    from share_client.backbones.pretrain_digits import FIRST_TASK_ROW, pretraining_digits

    pixels, labels = pretraining_digits()
    digits = sklearn.load_digits()
    assert len(pixels) == FIRST_TASK_ROW == 597
    assert labels.tolist() == digits.target[:597].tolist()
    assert torch.equal(pixels[:, 0], torch.tensor(digits.images[:597], dtype=torch.float32) / 16)


def test_shipped_features_tell_unseen_digits_apart(backbone: Backbone) -> None:
    """Nearest class mean over rows the pretraining never saw; chance is a tenth."""
    sklearn = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's digits")
    digits = sklearn.load_digits()
    pixels = torch.tensor(digits.images[597:], dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target[597:])
    features = backbone.features({"pixels": pixels})
    means = torch.stack([features[:600][labels[:600] == c].mean(dim=0) for c in range(10)])
    right = torch.cdist(features[600:], means).argmin(dim=1) == labels[600:]
    assert right.double().mean() > 0.85


@pytest.mark.parametrize("name", ["resnet", "/nowhere/model"])
def test_unknown_backbone_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a Hugging Face model directory with config\.json"):
        load_backbone(name, "cpu")


def test_device_is_checked() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="auto, cpu or cuda, got 'gpu'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees none"):
            choose_device("cuda")


def test_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="text backbones need transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        load_backbone(str(tmp_path), "cpu")


def test_minilm_has_query_and_value_of_six_layers(minilm: Backbone) -> None:
    assert len(minilm.sites) == 12
    assert {site.rpartition(".")[2] for site in minilm.sites} == {"query", "value"}
    assert builtin_spec("minilm") == describe_space("minilm", minilm.site_weights())


def text_config(folder: Path) -> TaskConfig:
    return TaskConfig(
        name="intent",
        kind="text-classification",
        train=folder / "train.jsonl",
        test=folder / "test.jsonl",
        epochs=4,
        batch_size=6,
    )


def test_text_is_learned_above_chance(minilm: Backbone, text_files: Path) -> None:
    task = prepare_task(text_config(text_files), minilm)
    assert (task.train_rows, task.test_rows, task.classes) == (24, 12, ("food", "weather"))
    space = empty_space(builtin_spec("minilm"))
    result = train_in_space(minilm, task, space, "o/intent", TrainingOptions.of(task.config))
    assert evaluate(minilm, task, update_adapter(result.update, space.bases), result.head).value > 0.8


def test_padding_does_not_change_features(minilm: Backbone, text_files: Path) -> None:
    task = prepare_task(text_config(text_files), minilm)
    lengths = task.test.lengths()
    short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
    assert lengths[short] < lengths[long]
    alone, _ = task.test.batch([short], minilm.device)
    together, _ = task.test.batch([short, long], minilm.device)
    torch.testing.assert_close(minilm.features(alone)[0], minilm.features(together)[0], atol=1e-5, rtol=1e-4)


def test_kind_and_backbone_must_agree(backbone: Backbone, text_files: Path) -> None:
    config = text_config(text_files)
    expected = "expects a backbone that takes texts, got digits-vit: .*; kinds for digits-vit are image-classification"
    with pytest.raises(ConfigError, match=expected):
        prepare_task(config, backbone)
    with pytest.raises(ConfigError, match="kind: expected one of"):
        prepare_task(replace(config, kind="poetry"), backbone)


def test_the_kinds_that_a_refusal_names_are_those_that_fit(
    backbone: Backbone, minilm: Backbone, text_files: Path
) -> None:
    denoiser = DiffusionBackbone.__new__(DiffusionBackbone)
    denoiser.name, denoiser.image_shape = "denoiser", (1, 8, 8)
    for one in (backbone, minilm, denoiser):
        refused = set()
        for kind in KINDS:
            config = replace(text_config(text_files), kind=kind, columns={"caption": "no such", "text": "no such"})
            with pytest.raises(ConfigError) as told:  # a fitting kind gets as far as the data
                prepare_task(config, one)
            if f"{kind} expects a backbone that" in str(told.value):
                refused.add(kind)
        assert refused == set(KINDS) - set(kinds_for(one)) != set(KINDS)
