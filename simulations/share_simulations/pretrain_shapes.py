"""Small backbones for images of shapes, pretrained here in seconds: an encoder of solids and a denoiser of flat shapes.

The rule that keeps pretraining apart from every task: the encoder sees the solids box and slab only, the denoiser only
squares and discs on white; tasks are about other solids and other shapes, with seeds of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from share_client.kinds.pose import rotation_of
from share_simulations.shapes import CAPTION_SIDE, COLOURS, FORMS, PLACES, PRETRAINING, captioned, posed

ROWS = 1200
"""Images that a pretraining draws from."""
WORDS = ("[PAD]", "[UNK]", "a", "on", "the", "at", "night", *COLOURS, *FORMS, *PLACES)
WORDS_MOST = 8
"""Words of a caption, with padding. The denoiser is told of all, as Stable Diffusion is."""


@dataclass(frozen=True)
class Pretrained:
    """A module in evaluation mode and how its training went."""

    module: Any
    first_loss: float
    """Mean loss of the first ten steps."""
    last_loss: float
    """Mean loss of the last ten steps."""


class SolidEncoder(nn.Module):
    """Four convolutions and a linear map: pixels (rows, 3, 24, 24) to features (rows, 96)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.project = nn.Linear(64 * 9, 96)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features of pixels in [0, 1]."""
        x = 2 * pixels - 1
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = nn.functional.gelu(conv(x))
        return nn.functional.gelu(self.project(x.flatten(1)))


def make_encoder() -> nn.Module:
    """Return an untrained encoder, for ``model = "share_simulations.pretrain_shapes:make_encoder"``."""
    return SolidEncoder()


def pretrain_encoder(steps: int, seed: int = 0, batch_size: int = 64) -> Pretrained:
    """Train an encoder to tell the poses of the solids for pretraining."""
    made = [posed(name, ROWS // len(PRETRAINING), seed + number) for number, name in enumerate(PRETRAINING)]
    pixels = torch.cat([torch.tensor(one.images).permute(0, 3, 1, 2).float() / 255 for one in made])
    turns = torch.cat([torch.tensor(one.rotations).float() for one in made])
    shifts = torch.cat([torch.tensor(one.translations).float() for one in made])
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, head = SolidEncoder(), nn.Linear(96, 9)
    optimizer = torch.optim.AdamW([*module.parameters(), *head.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch_size,), generator=draw)
        out = head(module(pixels[rows]))
        apart = rotation_of(out[:, :6]) - turns[rows]
        loss = (apart**2).sum(dim=(1, 2)).mean() / 2 + ((out[:, 6:] - shifts[rows]) ** 2).sum(dim=1).mean()
        losses.append(_step(loss, optimizer, schedule))
    return _finished(module, losses)


def make_denoiser() -> Any:
    """Return an untrained UNet2DConditionModel of diffusers for 12 x 12 pixels, about 100,000 parameters."""
    import diffusers

    made: Any = diffusers.UNet2DConditionModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return made(
            sample_size=CAPTION_SIDE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=4,
        )


def pretrain_denoiser(steps: int, seed: int = 0, batch_size: int = 32) -> Pretrained:
    """Train a denoiser to predict the noise on squares and discs on white."""
    import diffusers

    images, captions = captioned(("square", "disc"), ROWS, seed)
    pixels = 2 * torch.tensor(images).permute(0, 3, 1, 2).float() / 255 - 1
    tokenizer, text_encoder = _text_parts()
    known = sorted(set(captions))
    with torch.inference_mode():
        tokens = tokenizer(known, padding="max_length", max_length=WORDS_MOST, return_tensors="pt")
        hidden = text_encoder(input_ids=tokens["input_ids"]).last_hidden_state
    hidden, index = hidden.clone(), torch.tensor([known.index(caption) for caption in captions])
    scheduler_class: Any = diffusers.DDPMScheduler
    scheduler = scheduler_class()
    module = make_denoiser()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch_size,), generator=draw)
        noise = torch.randn(pixels[rows].shape, generator=draw)
        times = torch.randint(1000, (batch_size,), generator=draw)
        noisy = scheduler.add_noise(pixels[rows], noise, times)
        loss = nn.functional.mse_loss(module(noisy, times, encoder_hidden_states=hidden[index[rows]]).sample, noise)
        losses.append(_step(loss, optimizer, schedule))
    return _finished(module, losses)


def save_encoder(module: nn.Module, path: Path) -> None:
    """Write the encoder's weights as bfloat16, the precision of the fingerprint."""
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, path)


def save_denoiser(module: Any, directory: Path, scheduler: Any = None) -> None:
    """Write a pipeline directory: denoiser, text encoder, tokenizer and scheduler (that of DDPM unless given)."""
    import diffusers

    ddpm: Any = diffusers.DDPMScheduler
    tokenizer, text_encoder = _text_parts()
    name = "unet" if type(module).__name__.startswith("UNet") else "transformer"
    parts = {name: module, "text_encoder": text_encoder, "tokenizer": tokenizer}
    for folder, part in {**parts, "scheduler": scheduler or ddpm()}.items():
        part.save_pretrained(directory / folder)
    (directory / "model_index.json").write_text('{"_class_name": "DiffusionPipeline"}\n', encoding="utf-8")


def _text_parts() -> tuple[Any, Any]:
    """Return a tokenizer of :data:`WORDS` and a random CLIP text encoder: random features of so few words suffice."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = hf.PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=WORDS_MOST)
    config = hf.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=WORDS_MOST,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder: Any = hf.CLIPTextModel(config)
        encoder.eval()
    return tokenizer, encoder


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: Any) -> float:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    schedule.step()
    return float(loss.detach())


def _finished(module: nn.Module, losses: list[float]) -> Pretrained:
    return Pretrained(module.eval().requires_grad_(False), sum(losses[:10]) / 10, sum(losses[-10:]) / 10)
