"""Denoisers are told what the pipelines of diffusers tell them: calls of the real pipelines are recorded and repeated.

The last test plants bugs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from share_client.backbones import Batch, load_backbone
from share_client.backbones.diffusion import DiffusionBackbone

diffusers: Any = pytest.importorskip("diffusers", reason="denoisers need diffusers")
hf: Any = pytest.importorskip("transformers", reason="denoisers need transformers")
pytest.importorskip("PIL", reason="pipelines need pillow")

WORDS = ("[PAD]", "[UNK]", "a", "red", "circle", "on", "white", "Red")
TEXTS = ("a red circle", " a Red circle on white", "a red circle on white " * 40)


def tokenizer(most: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=most
    )


def clip(**more: Any) -> Any:
    config = hf.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, eos_token_id=0, bos_token_id=0, pad_token_id=0, **more,
    )  # fmt: skip
    return hf.CLIPTextModel(config).eval()


def t5() -> Any:
    return hf.T5EncoderModel(
        hf.T5Config(vocab_size=len(WORDS), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    ).eval()


def unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    ).eval()  # fmt: skip


def vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def stable_diffusion(**config: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(**config), tokenizer=tokenizer(77), unet=unet(), safety_checker=None,
        scheduler=diffusers.DDPMScheduler(steps_offset=1, clip_sample=False), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def deep_floyd() -> Any:
    return diffusers.IFPipeline(
        tokenizer=tokenizer(77), text_encoder=t5(), unet=unet(in_channels=3, out_channels=6), watermarker=None,
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def pixart(side: int) -> Any:
    module = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=side,
        patch_size=side // 4, cross_attention_dim=24, caption_channels=32,
    ).eval()  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer(120), text_encoder=t5(), vae=vae(), transformer=module,
        scheduler=diffusers.DDPMScheduler(steps_offset=1, clip_sample=False),
    )  # fmt: skip


PIPELINES: dict[str, tuple[Callable[[], Any], int]] = {
    "stable-diffusion": (stable_diffusion, 77),
    "stable-diffusion-masked": (lambda: stable_diffusion(use_attention_mask=True), 77),
    "deep-floyd": (deep_floyd, 77),
    "pixart": (lambda: pixart(8), 120),
    "pixart-large": (lambda: pixart(128), 120),
}
"""By name a pipeline and how many tokens of a caption it reads."""


def recorded(pipe: Any, text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the denoiser is given and says at the second of two steps of a pipeline: latent, times, output."""
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def keep(module: Any, given: Any, named: Any, out: Any) -> None:
        times = named["timestep"] if "timestep" in named else given[1]
        calls.append((given[0].clone(), times.reshape(-1).clone(), out[0].clone()))

    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    hook = denoiser.register_forward_hook(keep, with_kwargs=True)
    more: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    if not isinstance(pipe, diffusers.StableDiffusionPipeline):
        more["clean_caption"] = False
    if isinstance(pipe, diffusers.PixArtAlphaPipeline):
        more["use_resolution_binning"] = False
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(text, generator=torch.Generator().manual_seed(0), **more)
    finally:
        hook.remove()
    return calls[1]


def check(name: str, folder: Path) -> None:
    """Whatever the caption, the denoiser says what it says inside its pipeline."""
    make, most = PIPELINES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = make()
    pipe.save_pretrained(folder)
    backbone: Any = load_backbone(str(folder), "cpu")
    said = []
    for text in TEXTS:
        noisy, times, expected = recorded(pipe, text)
        captions, mask = backbone.encode([text], most if len(text) > most else 64)
        with torch.inference_mode():
            out = backbone.features({"noisy": noisy, "times": times, "captions": captions, "mask": mask})
        torch.testing.assert_close(out, expected[:, : out.shape[1]], rtol=1e-4, atol=1e-5)
        said.append(out)
    apart = (said[0] - said[2]).norm() / said[0].norm()
    assert apart > 1e-3, f"the caption must matter, or nothing is compared: {apart}"


@pytest.mark.parametrize("name", PIPELINES)
def test_a_denoiser_is_told_what_its_pipeline_tells_it(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


def test_max_length_cuts_captions_and_does_not_pad_them(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path)
    backbone: Any = load_backbone(str(tmp_path), "cpu")
    whole, mask = backbone.encode(["a red circle"], 64)
    cut, cut_mask = backbone.encode(["a red circle on white"], 3)
    assert whole.shape[1] == 77 and mask.sum() == 3
    assert torch.equal(whole, cut) and torch.equal(mask, cut_mask)


_encode, _features = DiffusionBackbone.encode, DiffusionBackbone.features


def _padded_to_max_length(self: DiffusionBackbone, captions: Sequence[str], max_length: int) -> Any:
    hidden, mask = _encode(self, captions, max_length)
    return hidden[:, :max_length], mask[:, :max_length]


def _encoder_told(self: DiffusionBackbone, captions: Sequence[str], max_length: int) -> Any:
    with mock.patch.object(self._text_encoder.config, "use_attention_mask", True, create=True):
        return _encode(self, captions, max_length)


def _as_written(self: DiffusionBackbone, captions: Sequence[str], max_length: int) -> Any:
    with mock.patch.object(self, "_like_t5", False):
        return _encode(self, captions, max_length)


def _denoiser_told(self: DiffusionBackbone, batch: Batch) -> Any:
    with mock.patch.object(self.module, "forward", partial(self.module.forward, encoder_attention_mask=batch["mask"])):
        return _features(self, batch)


def _denoiser_not_told(self: DiffusionBackbone, batch: Batch) -> Any:
    return _features(self, {**batch, "mask": torch.ones_like(batch["mask"])})


@pytest.mark.parametrize(
    ("name", "method", "bug"),
    [
        ("stable-diffusion", "encode", _padded_to_max_length),
        ("stable-diffusion", "encode", _encoder_told),
        ("stable-diffusion", "features", _denoiser_told),
        ("deep-floyd", "encode", _padded_to_max_length),
        ("deep-floyd", "encode", _as_written),
        ("deep-floyd", "features", _denoiser_told),
        ("pixart", "encode", _as_written),
        ("pixart", "features", _denoiser_not_told),
    ],
)
def test_the_check_catches_planted_bugs(name: str, method: str, bug: Any, tmp_path: Path) -> None:
    with mock.patch.object(DiffusionBackbone, method, bug), pytest.raises(AssertionError, match="not close"):
        check(name, tmp_path)
