"""Training by DP-SGD: gradients of single rows, clipped, summed, and hidden in noise (arXiv 1607.00133).

Opacus takes the gradient of every row of every trained matrix, clips, and drives the optimizer. It knows plain linear
maps, so a change is laid out as four of them here and read back in the end::

    y = base(x) + L E_o (E_i^T (R^T x)) + B (A^T x)

Only the matrices of cores, free directions and the head have gradients: the backbone is frozen. Everything that
depends on the rows goes through the noise: the rows of a step are drawn by Poisson sampling, an empty draw is a step of
pure noise, and free directions start at random and not from the gradient of the data.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone, Batch
from share_client.backbones.places import Place
from share_client.kinds import PreparedTask
from share_client.noise import system_normal, system_sample
from share_client.training.factors import Rated, SpaceFactors
from share_client.training.inject import injected
from share_client.training.loop import Trained, adamw, require_finite_loss, smoothed, triangle
from share_client.training.options import DEFAULT_EPOCHS, DEFAULT_RATE, Progress, ProgressCallback, TrainingOptions
from share_client.training.steps import parts_of
from share_core.errors import ConfigError
from share_core.privacy import SampleNoise


class PrivateLinear(nn.Module):
    """The map of :func:`~.inject.adapted` over :class:`SpaceFactors`, made of linear maps.

    A convolution is laid out as a linear map of every position's patch, which costs memory but is the same sum.
    """

    left: Tensor
    right: Tensor

    def __init__(self, base: Place, change: SpaceFactors) -> None:
        super().__init__()
        self.base = base.module
        self._patches = _patches_of(base) if base.kind == "conv" else None
        self.register_buffer("left", change.left)
        self.register_buffer("right", change.right)
        self.core_in, self.core_out = _two(change.core_in, change.core_out)
        self.free_in, self.free_out = _two(change.free_in, change.free_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out), or (rows, channels, height, width) to (rows, d_out, ...)."""
        y: Tensor = self.base(x)
        if self._patches is None:
            return self._changed(y, x)
        changed = self._changed(y.flatten(2).transpose(1, 2), self._patches(x).transpose(1, 2))
        return changed.transpose(1, 2).reshape(y.shape)

    def _changed(self, y: Tensor, x: Tensor) -> Tensor:
        if self.core_in is not None and self.core_out is not None:
            y = y + self.core_out(self.core_in(x @ self.right)) @ self.left.T
        if self.free_in is not None and self.free_out is not None:
            y = y + self.free_out(self.free_in(x))
        return y

    def rated(self, change: SpaceFactors) -> list[Rated]:
        """Return the trained matrices with the multiples that ``change`` has for its own."""
        multiples = [one.multiple for one in change.rated()]
        maps = (self.core_out, self.core_in, self.free_out, self.free_in)
        return [
            Rated(cast(nn.Parameter, one.weight), multiple)
            for one, multiple in zip(maps, multiples, strict=True)
            if one is not None
        ]

    def write_to(self, change: SpaceFactors) -> None:
        """Put what was trained into ``change``."""
        with torch.no_grad():
            for inner, outer, in_, out in (
                (self.core_in, self.core_out, change.core_in, change.core_out),
                (self.free_in, self.free_out, change.free_in, change.free_out),
            ):
                if inner is not None and outer is not None:
                    in_.copy_(inner.weight.T)
                    out.copy_(outer.weight)


def _patches_of(base: Place) -> Callable[[Tensor], Tensor]:
    """Return the map of (rows, channels, height, width) to the patches (rows, d_in, positions) of a convolution.

    Raises:
        ConfigError: a convolution of other than two dimensions, or with a padding that is not zeros of a given width.
    """
    conv = base.module
    if not isinstance(conv, nn.Conv2d) or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise ConfigError(
            f"site {base.site!r} is {conv}: mechanism dp-sgd takes Conv2d with zero padding of a given width only; "
            "leave [privacy] out or choose another backbone"
        )
    return nn.Unfold(conv.kernel_size, conv.dilation, conv.padding, conv.stride)


def _two(in_: Tensor, out: Tensor) -> tuple[nn.Linear | None, nn.Linear | None]:
    """Return linear maps x -> in_.T x and then -> out; none where there are no columns."""
    if not in_.shape[1]:
        return None, None
    maps = []
    for weight in (in_.detach().T, out.detach()):
        # On the meta device no random numbers are drawn for weights that are replaced at once.
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight.clone())
        maps.append(made)
    return maps[0], maps[1]


class _Model(nn.Module):
    """Backbone and head as one module, for Opacus to hook into."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.module = backbone.module
        self.head = head
        self._features = backbone.features

    def forward(self, inputs: Batch) -> Tensor:
        """Return the head's outputs (rows, ...)."""
        out: Tensor = self.head(self._features(inputs))
        return out


def train_private(
    backbone: Backbone,
    task: PreparedTask,
    head: nn.Module,
    changes: Mapping[str, SpaceFactors],
    options: TrainingOptions,
    declared: SampleNoise,
    progress: ProgressCallback | None,
) -> Trained:
    """Train ``head`` and ``changes`` in place by DP-SGD with the steps and noise that ``declared`` says.

    The optimizer and its schedule are those of :func:`~.loop.train`; they see only noisy gradients. Two calls never
    give the same result. The backbone is left as it was, however this ends. Matrix products are those of the weights'
    type and activations are kept, whatever ``options`` says: the hooks that tell rows apart need both.

    Raises:
        ConfigError: Opacus is not installed, or the loss is no finite number.
    """
    adapted = {site: PrivateLinear(backbone.site(site), change) for site, change in changes.items()}
    rated = [one for site, linear in adapted.items() for one in linear.rated(changes[site])]
    plain = adamw(head, backbone.width, rated, options.learning_rate or DEFAULT_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, triangle(declared.steps, options.warmup))
    parameters = [*head.parameters(), *(one.parameter for one in rated)]
    expected = declared.sample_rate * task.train_rows
    epochs = options.epochs or DEFAULT_EPOCHS
    per_epoch = max(1, declared.steps // epochs)
    mean: float | None = None
    with injected(backbone, adapted):
        hooks, optimizer = _opacus(_Model(backbone, head), plain, declared, expected)
        try:
            for step in range(1, declared.steps + 1):
                rows = system_sample(task.train_rows, declared.sample_rate)
                loss = _row_gradients(backbone, task.at(step), head, rows, parameters, options.accumulate)
                require_finite_loss(loss, step, task)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                mean = smoothed(mean, loss) if rows else mean
                if progress is not None:
                    epoch = min(epochs, 1 + (step - 1) // per_epoch)
                    late = float("nan") if mean is None else mean
                    progress(Progress(epoch, epochs, step, declared.steps, late))
                if options.pace > 0:
                    time.sleep(options.pace)
        finally:
            hooks.cleanup()
    for site, linear in adapted.items():
        linear.write_to(changes[site])
    return Trained(loss=float("nan") if mean is None else mean, steps=declared.steps)


def _row_gradients(
    backbone: Backbone,
    task: PreparedTask,
    head: nn.Module,
    rows: Sequence[int],
    parameters: Sequence[nn.Parameter],
    accumulate: int = 1,
) -> float:
    """Fill ``grad_sample`` of every parameter, (rows, *shape); return the mean loss, 0 for no rows.

    With more than one part it is a list of their tensors, which Opacus joins.
    """
    if not rows:
        for parameter in parameters:
            parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
        return 0.0
    mean = 0.0
    for part in parts_of(rows, accumulate):
        inputs, targets = task.train.batch(part, backbone.device)
        loss = task.kind.loss(task.kind.outputs(backbone, head, inputs), targets)
        with warnings.catch_warnings():
            # The first hooked map gets no gradient for its input: nothing before it is trained.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward()  # type: ignore[no-untyped-call]
        mean += loss.item() * len(part) / len(rows)
    return mean


def _opacus(model: nn.Module, plain: torch.optim.Optimizer, declared: SampleNoise, expected: float) -> tuple[Any, Any]:
    """Return Opacus' hooks on ``model`` and its optimizer around ``plain``."""
    try:
        from opacus.grad_sample import GradSampleHooks
        from opacus.optimizers import DPOptimizer
    except ImportError as error:
        raise ConfigError("mechanism dp-sgd needs opacus: pip install 'fedshare[privacy]'") from error

    class NoisyOptimizer(DPOptimizer):  # type: ignore[misc,unused-ignore]
        """Opacus' optimizer with noise from the operating system."""

        def add_noise(self) -> None:
            for parameter in self.params:
                summed = parameter.summed_grad
                noise = system_normal(tuple(summed.shape)) * (self.noise_multiplier * self.max_grad_norm)
                parameter.grad = (summed + noise.to(summed)).view_as(parameter)

    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="mean")
    optimizer = NoisyOptimizer(
        plain,
        noise_multiplier=declared.noise_multiplier,
        max_grad_norm=declared.max_grad_norm,
        expected_batch_size=expected,
        loss_reduction="mean",
    )
    return hooks, optimizer
