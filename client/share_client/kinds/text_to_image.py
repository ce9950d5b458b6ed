"""Images from captions: a denoiser learns noise (arXiv 2006.11239) or the velocity of a rectified flow (2209.03003).

With an image ``x``, noise ``e`` and a share ``a`` of the signal that is left at time t, ``epsilon`` predicts ``e`` from
``sqrt(a) x + sqrt(1 - a) e``; ``rectified-flow`` predicts ``e - x`` from ``(1 - t) x + t e`` with t from 0 to 1.

Noise and times of a training row follow from the seed, the step and the row: they are new in every epoch, the same in
every run, and the same in whatever parts a step is taken. Those of test rows follow from the row alone: the metric is
the negative loss at the same noise and times, whenever it is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from share_client import values
from share_client.backbones import Backbone, Batch
from share_client.backbones.diffusion import EPSILON, FLOW, DiffusionBackbone
from share_client.data import Field
from share_client.kinds.fitting import misfit
from share_client.kinds.image_tables import Pictured, read_image_tables
from share_client.kinds.kind import Kind, PreparedTask, Rows
from share_client.tasks_file import TaskConfig

FIELDS = (Field("caption", (str,)),)
OPTIONS = {"objective": lambda value, where: values.one_of(value, (EPSILON, FLOW), where)}
DRAWS = 4
"""Times at which each test row is measured, one in each quarter of all times."""


@dataclass(frozen=True)
class Noising:
    """How an image and noise are mixed, and what is to be predicted of the two."""

    objective: str
    """``epsilon`` or ``rectified-flow``."""
    signal: Tensor
    """(times,) share of the image's variance left at each time; for ``epsilon`` only."""

    def mix(self, image: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noisy image, the time that the denoiser is told, and the target.

        Args:
            image: (rows, c, h, w).
            noise: the same shape, standard normal.
            share: (rows,) how far from the image to the noise, from 0 to 1.
        """
        count = len(self.signal)
        if self.objective == FLOW:
            t = share.view(-1, 1, 1, 1)
            return (1 - t) * image + t * noise, share * count, noise - image
        times = (share * count).long().clamp(max=count - 1)
        a = self.signal[times].view(-1, 1, 1, 1)
        return a.sqrt() * image + (1 - a).sqrt() * noise, times, noise


class _Captioned(Rows):
    """Latents in memory, with their captions encoded once each."""

    def __init__(
        self, latents: Tensor, captions: Sequence[str], noising: Noising, seed: int | None, encoded: _Encoded
    ) -> None:
        self._latents = latents
        self._captions = torch.tensor([encoded.index[caption] for caption in captions])
        self._noising = noising
        self._seed = seed
        self._encoded = encoded
        self._step = 0

    def __len__(self) -> int:
        return len(self._latents)

    def lengths(self) -> Sequence[int]:
        """All rows cost the same."""
        return [1] * len(self)

    def at(self, step: int) -> Rows:
        """Return the rows with noise and times of another step."""
        other = copy(self)
        other._step = step
        return other

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Batch, Tensor]:
        """Return ``noisy``, ``times``, ``captions`` and ``mask`` of the rows, and the targets (n, c, h, w).

        Of training rows there is one of each; of test rows there are :data:`DRAWS`, a row's own beside each other.
        """
        of, count = ("test", DRAWS) if self._seed is None else (f"{self._seed}/{self._step}", 1)
        index = torch.tensor(rows).repeat_interleave(count)
        drawn = [self._drawn(f"{of}/{row}", count) for row in rows]
        noise = torch.cat([one for one, _ in drawn])
        share = torch.cat([(torch.arange(count) + part) / count for _, part in drawn])
        noisy, times, target = self._noising.mix(self._latents[index], noise, share)
        own = self._captions[index]
        batch = {
            "noisy": noisy,
            "times": times,
            "captions": self._encoded.hidden[own],
            "mask": self._encoded.mask[own],
        }
        return {name: tensor.to(device) for name, tensor in batch.items()}, target.to(device)

    def _drawn(self, of: str, count: int) -> tuple[Tensor, Tensor]:
        """Return noise (count, c, h, w) and numbers (count,) from 0 to 1 that ``of`` decides."""
        digest = hashlib.sha256(f"fedshare/noise/{of}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return torch.randn(count, *self._latents.shape[1:], generator=draw), torch.rand(count, generator=draw)


@dataclass(frozen=True)
class _Encoded:
    """Each caption once."""

    index: dict[str, int]
    hidden: Tensor
    """(captions, tokens, width)"""
    mask: Tensor
    """(captions, tokens)"""


class TextToImage(Kind):
    """A denoiser told the caption. There is no head: the adapter is all that is learned."""

    name = "text-to-image"
    metric = "negative_loss"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read both tables and encode images and captions.

        Raises:
            ConfigError: unreadable data, images of another size, or a backbone that is no denoiser.
        """
        if not isinstance(backbone, DiffusionBackbone):
            such_as = "a pipeline directory of diffusers"
            raise misfit(config.name, self.name, backbone, "makes images of texts", such_as)
        train, test, options = read_image_tables(config, FIELDS, backbone.image_shape, OPTIONS)
        noising = Noising(options.get("objective", backbone.objective), backbone.signal)
        captions = sorted({*train.table.columns["caption"], *test.table.columns["caption"]})
        hidden, mask = backbone.encode(captions, config.max_length)
        encoded = _Encoded({caption: number for number, caption in enumerate(captions)}, hidden, mask)

        def rows(split: Pictured, seed: int | None) -> Rows:
            return _Captioned(backbone.latents(split.pixels), split.table.columns["caption"], noising, seed, encoded)

        return PreparedTask(config, self, rows(train, config.seed), rows(test, None), ())

    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a module without parameters: what the denoiser says is the output."""
        return nn.Identity()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(outputs, targets)

    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of each row at each of its times, (rows * DRAWS, 1)."""
        return ((outputs - targets) ** 2).flatten(1).mean(dim=1, keepdim=True)

    def score(self, judged: Tensor) -> float:
        """Return the negative mean."""
        return -float(judged.double().mean())
