"""Denoisers of diffusers, read from a local pipeline directory and never from a network.

The directory is one that ``save_pretrained`` of a pipeline wrote: ``unet`` (UNet2DConditionModel) or ``transformer``
(PixArtTransformer2DModel, a DiT with cross attention), ``text_encoder``, ``tokenizer``, ``scheduler``, and ``vae``
where the denoiser works on latents. Only the denoiser is adapted; the rest is used as it is.

What the denoiser is told beside the noisy image is what the pipeline of diffusers tells it without guidance:

* UNet and CLIP (``StableDiffusionPipeline``): captions padded to the tokenizer's ``model_max_length``; the text encoder
  is told which tokens are padding only if its ``use_attention_mask`` says so, the denoiser never is.
* UNet and T5 (``IFPipeline``): padded alike; the text encoder is told of the padding, the denoiser is not.
* PixArt (``PixArtAlphaPipeline``, ``PixArtSigmaPipeline``): both are told, so that the length of the padding changes
  nothing; and the size of the image where the denoiser takes it.

Captions of the last two are put in lower case and stripped, as their pipelines do with ``clean_caption=False``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from share_client.backbone_config import BackboneConfig
from share_client.backbones.backbone import Backbone, Batch, choose_device, freeze
from share_client.backbones.sites import choose_sites
from share_core.errors import ConfigError

SITES = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention maps, as in the training scripts of diffusers."""
EPSILON, FLOW = "epsilon", "rectified-flow"
PIXART = "PixArtTransformer2DModel"
ENDLESS = 2**20
"""A tokenizer without a limit has a ``model_max_length`` far above this."""
CHUNK = 32
"""Captions or images encoded at a time."""


class DiffusionBackbone(Backbone):
    """A denoiser that takes ``noisy`` (rows, c, h, w), ``times`` (rows,) and ``captions`` (rows, tokens, width)."""

    image_shape: tuple[int, int, int]
    """(channels, height, width) of the images, before the autoencoder where there is one."""
    objective: str
    """What it was trained for: ``epsilon``, or ``rectified-flow`` where its scheduler is one of flow matching."""
    signal: Tensor
    """(times,) share of the image's variance that is left at each time: ``alphas_cumprod``."""

    def __init__(self, config: BackboneConfig, device: str = "auto") -> None:
        directory = Path(config.model)
        self.name = directory.name
        self.device = choose_device(device)
        module = _denoiser(directory)
        self._pixart = type(module).__name__ == PIXART
        self.sites = choose_sites(module, config.sites or SITES, f"backbone {self.name}")
        self.module = freeze(module, self.device)
        self._text_encoder = freeze(_text_encoder(directory), self.device)
        self._like_t5 = self._pixart or type(self._text_encoder).__name__ == "T5EncoderModel"
        self._tokenizer = _load("transformers", "AutoTokenizer", directory / "tokenizer")
        self._vae = _load("diffusers", "AutoencoderKL", directory / "vae") if (directory / "vae").is_dir() else None
        if self._vae is not None:
            freeze(self._vae, self.device)
        self.objective, self.signal = _schedule(directory / "scheduler")
        self.width = int(module.config.in_channels)
        side, channels = int(module.config.sample_size), self.width
        if self._vae is not None:
            side *= 2 ** (len(self._vae.config.block_out_channels) - 1)
            channels = int(self._vae.config.in_channels)
        self.image_shape = (channels, side, side)

    def features(self, batch: Batch) -> Tensor:
        """Return what the denoiser predicts, (rows, c, h, w): the noise, or the velocity of a rectified flow."""
        more: dict[str, Any] = {}
        if self._pixart:
            more = {"encoder_attention_mask": batch["mask"], "added_cond_kwargs": self._size(batch["noisy"])}
        out: Tensor = self.module(
            batch["noisy"], timestep=batch["times"], encoder_hidden_states=batch["captions"], **more
        ).sample
        return out[:, : self.width]

    def _size(self, noisy: Tensor) -> dict[str, Tensor | None]:
        """Return the image's height and width and their ratio, as ``PixArtAlphaPipeline`` tells a large denoiser."""
        if not self.module.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        side = float(self.image_shape[1])
        return {"resolution": noisy.new_full((len(noisy), 2), side), "aspect_ratio": noisy.new_ones(len(noisy), 1)}

    @torch.inference_mode()
    def encode(self, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Return what the text encoder makes of captions, (n, tokens, width), and the mask (n, tokens), on the CPU.

        Captions are cut to ``max_length`` tokens, or to what tokenizer and text encoder take if that is less.
        """
        config = self._text_encoder.config
        most = min(self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", ENDLESS))
        limit = min(max_length, most)
        # A denoiser that is not told which tokens are padding sees them: there must be as many as in its pipeline.
        width = limit if self._pixart or most >= ENDLESS else most
        if self._like_t5:
            captions = [caption.lower().strip() for caption in captions]
        told = self._like_t5 or getattr(config, "use_attention_mask", False)
        hidden, masks = [], []
        for start in range(0, len(captions), CHUNK):
            cut = self._tokenizer(list(captions[start : start + CHUNK]), max_length=limit, truncation=True)
            tokens = self._tokenizer.pad(cut, padding="max_length", max_length=width, return_tensors="pt")
            ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
            found = self._text_encoder(input_ids=ids, attention_mask=mask if told else None)
            hidden.append(found.last_hidden_state.cpu())
            masks.append(mask.cpu())
        return torch.cat(hidden).clone(), torch.cat(masks).clone()

    @torch.inference_mode()
    def latents(self, pixels: Tensor) -> Tensor:
        """Return what is noised of images (n, c, h, w) in [0, 1], on the CPU: their latents' means, or -1 to 1."""
        pixels = 2 * pixels - 1
        if self._vae is None:
            return pixels
        scale = float(self._vae.config.scaling_factor)
        chunks = torch.split(pixels, CHUNK)
        found = [self._vae.encode(chunk.to(self.device)).latent_dist.mean.cpu() * scale for chunk in chunks]
        return torch.cat(found).clone()


def load(config: BackboneConfig, device: str) -> Backbone:
    """Return the denoiser of a pipeline directory.

    Raises:
        ConfigError: diffusers is missing, a part of the directory is missing, or of a class that is not known here.
    """
    return DiffusionBackbone(config, device)


def _denoiser(directory: Path) -> Any:
    if (directory / "unet").is_dir():
        return _load("diffusers", "UNet2DConditionModel", directory / "unet")
    found = _class_name(directory / "transformer" / "config.json", "_class_name")
    if found != PIXART:
        raise ConfigError(
            f"backbone {directory}: expected a folder unet (UNet2DConditionModel) or transformer "
            f"({PIXART}), got {found or 'neither'}; other denoisers take more than a caption"
        )
    return _load("diffusers", found, directory / "transformer")


def _text_encoder(directory: Path) -> Any:
    folder = directory / "text_encoder"
    found = _class_name(folder / "config.json", "architectures")
    if found not in ("CLIPTextModel", "T5EncoderModel"):
        raise ConfigError(
            f"backbone {directory}: text_encoder: expected CLIPTextModel or T5EncoderModel, got {found or 'none'}"
        )
    return _load("transformers", found, folder)


def _class_name(path: Path, key: str) -> str | None:
    """Return what a configuration says of its class."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value[0] if isinstance(value, list) and value else value if isinstance(value, str) else None


def _load(package: str, name: str, folder: Path) -> Any:
    """Return a part of a pipeline.

    Raises:
        ConfigError: the package is missing, or cannot load it.
    """
    try:
        module: Any = __import__(package)
        made = getattr(module, name)
    except ImportError as error:
        raise ConfigError(f"backbone {folder.parent} needs {package}: pip install 'fedshare[diffusion]'") from error
    more: dict[str, Any] = {"torch_dtype" if package == "diffusers" else "dtype": torch.float32}
    if package == "diffusers":
        # Otherwise it patches nn.Module of the whole process meanwhile, and what another thread trains breaks.
        more["low_cpu_mem_usage"] = False
    more = {} if name == "AutoTokenizer" else {**more, "use_safetensors": True}
    try:
        return made.from_pretrained(folder, local_files_only=True, **more)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"backbone {folder.parent}: {package} cannot load {folder.name}: {error}") from error


def _schedule(folder: Path) -> tuple[str, Tensor]:
    """Return the objective and the share of the signal at each time.

    Raises:
        ConfigError: the denoiser predicts something else than noise.
    """
    name = _class_name(folder / "scheduler_config.json", "_class_name") or "none"
    if name.startswith("FlowMatch"):
        return FLOW, torch.linspace(1, 0, 1000)
    if _class_name(folder / "scheduler_config.json", "prediction_type") not in (None, EPSILON):
        raise ConfigError(f"backbone {folder.parent}: scheduler: expected prediction_type epsilon, got another")
    module: Any = __import__("diffusers")
    try:
        return EPSILON, module.DDPMScheduler.from_pretrained(folder, local_files_only=True).alphas_cumprod.float()
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone {folder.parent}: diffusers cannot load its scheduler: {error}") from error
