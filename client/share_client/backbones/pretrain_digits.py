"""Pretraining of ``digits-vit``: ``python -m share_client.backbones.pretrain_digits [OUT]``.

The rule that keeps pretraining apart from every task: of scikit-learn's 1,797 digits in their own order, rows 0 to 596
are for pretraining only; tasks use rows 597 and later (:data:`FIRST_TASK_ROW`). The pretext is to name the digit
of an upright image after a random shift, a change of contrast and noise, and to paint in patches that were hidden. No
rotation, inversion or split of the classes is ever seen here, so that those are new to the backbone.

The weights are stored in bfloat16, the precision of the fingerprint, and computed with in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from share_client.backbones.digits_vit import IMAGE, WEIGHTS_FILE, WIDTH, DigitsTransformer
from share_core.errors import ConfigError

FIRST_TASK_ROW = 597
"""Rows of scikit-learn's digits before this one are pretraining rows; tasks may use this one and all later ones."""


@dataclass(frozen=True)
class Pretrained:
    """An encoder and how well its pretext head did."""

    module: DigitsTransformer
    """The trained encoder, in evaluation mode."""
    first_loss: float
    """Mean loss of the first ten steps."""
    last_loss: float
    """Mean loss of the last ten steps."""


def pretraining_digits() -> tuple[Tensor, Tensor]:
    """Return pixels (597, 1, 8, 8) in [0, 1] and labels (597,) of the pretraining rows.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("pretraining needs scikit-learn: pip install 'fedshare[simulation]'") from error
    digits = load_digits()
    pixels = torch.tensor(digits.images[:FIRST_TASK_ROW], dtype=torch.float32) / 16
    return pixels.unsqueeze(1), torch.tensor(digits.target[:FIRST_TASK_ROW])


def pretrain(
    steps: int, seed: int = 0, batch_size: int = 128, progress: Callable[[int, float], None] | None = None
) -> Pretrained:
    """Train the encoder from random values; deterministic given the seed on one machine and thread count."""
    pixels, labels = pretraining_digits()
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, classify, paint = DigitsTransformer(), nn.Linear(WIDTH, 10), nn.Linear(WIDTH, IMAGE * IMAGE)
    parameters = [*module.parameters(), *classify.parameters(), *paint.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    for step in range(steps):
        rows = torch.randint(len(pixels), (batch_size,), generator=draw)
        clean = _shift(pixels[rows], draw)
        features = module(_spoil(clean, draw))
        named = nn.functional.cross_entropy(classify(features), labels[rows], label_smoothing=0.1)
        painted = nn.functional.mse_loss(paint(features), clean.flatten(1))
        loss = named + 2 * painted
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    first, last = losses[:10], losses[-10:]
    return Pretrained(module.eval(), sum(first) / len(first), sum(last) / len(last))


def _shift(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Move the whole batch by at most one pixel up or down and left or right."""
    down, right = torch.randint(-1, 2, (2,), generator=draw).tolist()
    padded = nn.functional.pad(pixels, (1, 1, 1, 1))
    return padded[:, :, 1 + down : 1 + down + IMAGE, 1 + right : 1 + right + IMAGE]


def _spoil(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Change contrast, add noise and hide a fifth of the 2 x 2 patches."""
    rows = len(pixels)
    contrast = 0.6 + 0.8 * torch.rand(rows, 1, 1, 1, generator=draw)
    noise = 0.1 * torch.randn(pixels.shape, generator=draw)
    seen = (torch.rand(rows, 1, IMAGE // 2, IMAGE // 2, generator=draw) > 0.2).float()
    return (pixels * contrast + noise).clamp(0, 1) * nn.functional.interpolate(seen, scale_factor=2)


def save_weights(module: DigitsTransformer, path: Path) -> None:
    """Write the encoder's weights as bfloat16 safetensors."""
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in module.state_dict().items()}, path)


def main() -> None:
    """Pretrain for 2,000 steps (about two minutes on two cores) and write the weights."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / WEIGHTS_FILE

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)

    save_weights(pretrain(steps=2000, progress=progress).module, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
