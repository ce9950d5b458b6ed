"""Text regression: a number for each text or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from share_client import values
from share_client.backbones import Backbone
from share_client.data import Field, read_splits
from share_client.kinds.kind import Kind, PreparedTask
from share_client.kinds.texts import TEXTS, text_backbone, text_rows
from share_client.tasks_file import TaskConfig, read_options
from share_core.errors import ConfigError
from share_core.privacy import SAMPLES

FIELDS = (*TEXTS, Field("score", (float,)))
"""What a row holds: one text or two, and the number."""


class ScaledHead(nn.Module):
    """``mean + scale * linear(features)``: one number in the units of the data, learned as a standardised one.

    Both constants are buffers, so that a head that is shared is enough to predict.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, mean: float, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.register_buffer("mean", torch.tensor([mean]))
        self.register_buffer("scale", torch.tensor([scale]))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (rows, width) to numbers (rows,)."""
        out: Tensor = self.mean + self.scale * self.linear(features).squeeze(1)
        return out


@dataclass(frozen=True)
class TextRegression(Kind):
    """A number for each text or pair of texts, by least squares."""

    mean: float = 0.0
    """Mean of the training rows, or the middle of the option ``range``."""
    scale: float = 1.0
    """Standard deviation of the training rows, or half the width of ``range``."""

    name = "text-regression"
    metric = "pearson"

    def prepare(self, config: TaskConfig, backbone: Backbone) -> PreparedTask:
        """Read and tokenise both files.

        Raises:
            ConfigError: unreadable data, numbers that are all the same or outside the option ``range``, DP-SGD without
                ``range``, or a backbone that takes no text.
        """
        takes = text_backbone(config, backbone)
        given = read_options(config, {"range": _range})
        if config.privacy is not None and config.privacy.mechanism == SAMPLES and not given:
            raise ConfigError(
                f"task {config.name!r}: options: range is missing: without it mean and spread of the training rows set "
                f"the scale, and {SAMPLES} adds no noise to them; add range = [low, high], known without the data"
            )
        train, test = read_splits(config, FIELDS)
        scores = [torch.tensor(table.columns["score"], dtype=torch.float64) for table in (train, test)]
        if given:
            low, high = given["range"]
            for table, found in zip((train, test), scores, strict=True):
                outside = (found < low) | (found > high)
                if outside.any():
                    raise ConfigError(
                        f"{table.where(int(outside.int().argmax()))}: score: expected a number from {low:g} to "
                        f"{high:g}, as options.range says, got one outside; widen the range or mend the row"
                    )
            kind = TextRegression((low + high) / 2, (high - low) / 2)
        else:
            kind = TextRegression(float(scores[0].mean()), float(scores[0].std(correction=0)))
        if not kind.scale > 0 or not math.isfinite(kind.scale):
            raise ConfigError(
                f"{config.train}: score: expected numbers that differ and whose squares can be summed, got "
                f"{'numbers that are all the same' if kind.scale == 0 else 'too large ones'}; nothing can be learned"
            )
        return PreparedTask(
            config=config,
            kind=kind,
            train=text_rows(train, scores[0].float(), takes, config),
            test=text_rows(test, scores[1].float(), takes, config),
            classes=("score",),
        )

    def head(self, task: PreparedTask, width: int) -> nn.Module:
        """Return a linear map from features to one number."""
        return ScaledHead(width, self.mean, self.scale)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error in units of :attr:`scale`."""
        return (((outputs - targets) / self.scale) ** 2).mean()

    def judge(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return prediction and target, (rows, 2)."""
        return torch.stack([outputs.float(), targets], dim=1)

    def score(self, judged: Tensor) -> float:
        """Return Pearson's correlation of predictions and targets; 0 where one of them does not vary."""
        apart = judged.double() - judged.double().mean(dim=0)
        lengths = apart.norm(dim=0)
        if float(lengths.min()) <= 1e-9 * float(judged.abs().max()):
            return 0.0
        return float((apart[:, 0] @ apart[:, 1] / lengths.prod()).clamp(-1, 1))

    def details(self, judged: Tensor) -> Mapping[str, float]:
        """Return the root of the mean squared error, in the units of the data."""
        apart = judged[:, 0].double() - judged[:, 1].double()
        return {"rmse": float(apart.square().mean().sqrt())}


def _range(value: object, where: str) -> tuple[float, float]:
    if isinstance(value, list) and len(value) == 2:
        low, high = (values.number(-1e12, 1e12)(one, where) for one in value)
        if low < high:
            return low, high
    raise ConfigError(f"{where}: expected [low, high], got {values.show(value)}")
