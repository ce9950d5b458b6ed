"""Denoisers: both objectives, noise that is fixed where it must be, pipeline directories. The last test plants bugs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_client.backbones import Backbone, load_backbone
from share_client.kinds import text_to_image
from share_client.kinds.text_to_image import DRAWS, Noising, TextToImage
from share_client.tasks_file import TaskConfig
from share_client.training import TrainingOptions, evaluate, prepare_task, train_lora
from share_client.training.loop import fresh_head
from share_client.training.steps import part_losses
from share_core.errors import ConfigError

diffusers = pytest.importorskip("diffusers", reason="denoisers need diffusers")
CPU = torch.device("cpu")


def check_epsilon(seed: int) -> None:
    """The mixture is that of diffusers' own scheduler, and the target is the noise."""
    draw = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, 6, 3, 4, 4, generator=draw)
    share = torch.rand(6, generator=draw)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50)
    noisy, times, target = Noising("epsilon", scheduler.alphas_cumprod).mix(image, noise, share)
    assert times.tolist() == [int(part * 50) for part in share.tolist()]
    torch.testing.assert_close(noisy, scheduler.add_noise(image, noise, times))
    torch.testing.assert_close(target, noise)


def check_flow(seed: int) -> None:
    """The mixture is that of diffusers' scheduler of flow matching, and an Euler step along the target is exact."""
    draw = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, 5, 3, 4, 4, generator=draw)
    share = torch.rand(5, generator=draw) * 0.9 + 0.05
    noisy, times, velocity = Noising("rectified-flow", torch.linspace(1, 0, 1000)).mix(image, noise, share)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    for row in range(5):
        scheduler.timesteps, scheduler.sigmas = times[row : row + 1], torch.stack([share[row], torch.tensor(0.0)])
        scheduler._step_index = scheduler._begin_index = None
        theirs = scheduler.scale_noise(image[row : row + 1], times[row : row + 1], noise[row : row + 1])
        torch.testing.assert_close(noisy[row : row + 1], theirs)
        scheduler._step_index = None
        back = scheduler.step(velocity[row : row + 1], times[row : row + 1], noisy[row : row + 1]).prev_sample
        torch.testing.assert_close(back, image[row : row + 1], rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20))
def test_images_and_noise_are_mixed_as_diffusers_does(seed: int) -> None:
    check_epsilon(seed)
    check_flow(seed)


def test_noise_is_new_in_training_and_fixed_in_tests(denoiser: Backbone, captions: TaskConfig) -> None:
    task = prepare_task(captions, denoiser)
    one, again, other = (task.train.at(step).batch([1, 2], CPU) for step in (4, 4, 5))
    assert torch.equal(one[1], again[1])
    for row in (0, 1):
        assert not torch.equal(one[1][row], other[1][row]), "at another step a row has other noise"
        assert not torch.equal(one[0]["times"][row], other[0]["times"][row])
    assert not torch.equal(one[1][0], one[1][1]), "another row has other noise"
    for name, tensor in task.train.at(4).batch([3, 2], CPU)[0].items():
        assert torch.equal(tensor[1], one[0][name][1]), "whatever other rows there are"
    seeded = prepare_task(replace(captions, seed=1), denoiser).train.batch([1, 2], CPU)
    assert not torch.equal(one[1], seeded[1])
    alone, both = task.test.batch([2], CPU), task.test.batch([0, 2], CPU)
    assert alone[1].shape == (DRAWS, 3, 12, 12)
    for name, tensor in alone[0].items():
        assert torch.equal(tensor, both[0][name][DRAWS:])
    assert (alone[0]["times"] * DRAWS // 1000).tolist() == list(range(DRAWS)), "one time in each quarter"
    assert evaluate(denoiser, task, {}, {}) == evaluate(denoiser, task, {}, {})


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_a_row_never_meets_the_same_noise_twice(denoiser: Backbone, captions: TaskConfig, batch_size: int) -> None:
    """Even where every epoch has the same batches, as with one row each."""
    task = prepare_task(captions, denoiser)
    met: list[Tensor] = []
    loss = TextToImage.loss

    def watched(self: TextToImage, outputs: Tensor, noise: Tensor) -> Tensor:
        met.extend(noise)
        return loss(self, outputs, noise)

    with mock.patch.object(TextToImage, "loss", watched):
        train_lora(denoiser, task, 2, TrainingOptions(epochs=3, batch_size=batch_size))
    assert len(met) == 36
    assert len({tuple(noise.flatten().tolist()) for noise in met}) == 36


def test_parts_of_a_step_change_nothing(denoiser: Backbone, captions: TaskConfig) -> None:
    task = prepare_task(captions, denoiser)
    head = fresh_head(denoiser, task, 0, None)
    losses = []
    for accumulate in (1, 2, 4, 11):
        with torch.no_grad():
            parts = part_losses(denoiser, task.at(3), head, range(11), TrainingOptions(accumulate=accumulate))
            losses.append(float(sum(parts)))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    trained = [train_lora(denoiser, task, 2, TrainingOptions(epochs=2, accumulate=count)) for count in (1, 3)]
    whole, parted = (evaluate(denoiser, task, one.adapter, {}).value for one in trained)
    assert parted == pytest.approx(whole, rel=1e-4)


def test_a_row_has_its_own_caption(denoiser: Backbone, captions: TaskConfig) -> None:
    task = prepare_task(captions, denoiser)
    lines = [json.loads(line)["caption"] for line in captions.train.read_text().splitlines()]
    hidden, mask = denoiser.encode(lines, captions.max_length)  # type: ignore[attr-defined]
    inputs, _ = task.train.batch([4, 0], CPU)
    torch.testing.assert_close(inputs["captions"], hidden[[4, 0]])
    assert torch.equal(inputs["mask"], mask[[4, 0]])
    assert hidden.shape[1:] == (8, 32)


def test_judging_keeps_one_number_for_each_row_and_time() -> None:
    outputs, targets = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    kind = TextToImage()
    judged = torch.cat([kind.judge(outputs[:4], targets[:4]), kind.judge(outputs[4:], targets[4:])])
    assert judged.shape == (8, 1)
    assert kind.score(judged) == pytest.approx(-float(kind.loss(outputs, targets)), rel=1e-5)


def test_a_transformer_of_flow_matching(tmp_path: Path, captions: TaskConfig) -> None:
    """PixArt's DiT: the objective is that of its scheduler, and sites are its attention maps."""
    from share_simulations.pretrain_shapes import save_denoiser

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=12,
            patch_size=2, cross_attention_dim=16, caption_channels=32, use_additional_conditions=False,
        )  # fmt: skip
    save_denoiser(module, tmp_path / "dit", diffusers.FlowMatchEulerDiscreteScheduler())
    backbone = load_backbone(str(tmp_path / "dit"), "cpu")
    assert len(backbone.sites) == 16
    task = prepare_task(captions, backbone)
    inputs, targets = task.train.batch([0, 1], CPU)
    assert not inputs["times"].eq(inputs["times"].round()).all(), "times of a flow are not whole numbers"
    assert backbone.features(inputs).shape == targets.shape == (2, 3, 12, 12)
    epsilon = prepare_task(replace(captions, options={"objective": "epsilon"}), backbone).train.batch([0, 1], CPU)
    assert not torch.equal(epsilon[1], targets)


def test_an_autoencoder_gives_the_latents(denoiser_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-vae"
    shutil.copytree(denoiser_folder, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, scaling_factor=0.5,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    backbone: Any = load_backbone(str(folder), "cpu")
    assert backbone.image_shape == (3, 24, 24)
    pixels = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = vae.eval().encode(2 * pixels - 1).latent_dist.mean * 0.5
    torch.testing.assert_close(backbone.latents(pixels), expected.detach())


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "unet"), "expected a folder unet .* or transformer .*got neither"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder: expected CLIPTextModel or T5Enc"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "diffusers cannot load its scheduler"),
        (
            lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text(
                '{"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}'
            ),
            "expected prediction_type epsilon, got another",
        ),
    ],
)
def test_a_broken_pipeline_is_refused(
    denoiser_folder: Path, tmp_path: Path, break_it: Callable[[Path], None], words: str
) -> None:
    shutil.copytree(denoiser_folder, tmp_path / "pipe")
    break_it(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=words):
        load_backbone(str(tmp_path / "pipe"), "cpu")


def test_what_does_not_fit_is_refused(denoiser: Backbone, captions: TaskConfig) -> None:
    with pytest.raises(ConfigError, match=r"got digits-vit: set backbone in tasks\.toml to a pipeline"):
        prepare_task(captions, load_backbone("digits-vit", "cpu"))
    with pytest.raises(ConfigError, match=r"objective: expected one of epsilon, rectified-flow, got 'v'"):
        prepare_task(replace(captions, options={"objective": "v"}), denoiser)


_mix = Noising.mix


def _swapped(self: Noising, image: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    noisy, times, target = _mix(self, noise, image, share)
    return noisy, times, target


def _reversed(self: Noising, image: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    noisy, times, target = _mix(self, image, noise, share)
    return noisy, times, -target


@pytest.mark.parametrize("bug", [_swapped, _reversed])
@pytest.mark.parametrize("check", [check_epsilon, check_flow])
def test_the_checks_catch_planted_bugs(check: Callable[[int], None], bug: Any) -> None:
    with mock.patch.object(text_to_image.Noising, "mix", bug), pytest.raises(AssertionError):
        check(1)
