"""The one training loop: AdamW on a head and on the changes of some sites, the backbone frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from share_client.backbones import Backbone
from share_client.kinds import PreparedTask
from share_client.training.batches import epoch_batches
from share_client.training.early import EarlyStop, held_out
from share_client.training.factors import Rated, SiteFactors, rate_for
from share_client.training.inject import adapted, injected
from share_client.training.moments import Moments
from share_client.training.options import Progress, ProgressCallback, TrainingOptions, schedule_of, steps_of
from share_client.training.steps import part_losses, recomputed
from share_core.errors import ConfigError

_SMOOTHING = 0.9
"""How much of the running mean of the loss is kept at each step."""


@dataclass(frozen=True)
class Trained:
    """What the loop leaves besides the parameters it changed in place."""

    loss: float
    steps: int
    moments: Moments = field(default_factory=dict, repr=False)
    """What Adam knew of every parameter at the end, for a training that goes on with some of them."""


def fresh_head(backbone: Backbone, task: PreparedTask, seed: int, start: Mapping[str, Tensor] | None) -> nn.Module:
    """Return a head on the backbone's device, drawn from ``seed``, or loaded from ``start``.

    Raises:
        ConfigError: ``start`` does not fit the task's head, for example because the classes changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = task.kind.head(task, backbone.width)
    if start is not None:
        load_head(head, start, task)
    return head.to(backbone.device)


def fits_head(backbone: Backbone, task: PreparedTask, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether ``tensors`` have the names and shapes of the task's head."""
    head = fresh_head(backbone, task, 0, None)
    return _shapes(head.state_dict()) == _shapes(tensors)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def load_head(head: nn.Module, tensors: Mapping[str, Tensor], task: PreparedTask) -> None:
    """Copy tensors into a head.

    Raises:
        ConfigError: a name or shape differs.
    """
    expected, got = _shapes(head.state_dict()), _shapes(tensors)
    if expected != got:
        raise ConfigError(
            f"task {task.config.name!r}: head: expected {expected} for {len(task.classes)} classes, got {got}; "
            "train the task again without this head"
        )
    head.load_state_dict(dict(tensors))


def head_tensors(head: nn.Module) -> dict[str, Tensor]:
    """Return copies of the head's tensors on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in head.state_dict().items()}


def train(
    backbone: Backbone,
    task: PreparedTask,
    head: nn.Module,
    changes: Mapping[str, SiteFactors],
    options: TrainingOptions,
    progress: ProgressCallback | None,
    span: tuple[float, float] = (0.0, 1.0),
    moments: Moments | None = None,
) -> Trained:
    """Train ``head`` and ``changes`` in place by AdamW with linear warm-up and linear decay.

    Deterministic given ``options.seed`` in one thread. The backbone is left as it was. Where neither has a number to
    train no step is taken. With ``options.patience`` a tenth of the rows is held out, see :mod:`~.early`.

    Args:
        backbone: the encoder.
        task: what is trained on.
        head: the head.
        changes: by site.
        options: see :class:`TrainingOptions`.
        progress: called after every step.
        span: which part of the steps is taken, with the rows and rates as if all were; (0.5, 1.0) is the second half.
        moments: of the part before. Parameters found there go on with them; new ones begin anew.

    Raises:
        ConfigError: the loss is no finite number, or rows cannot be held out.
    """
    rated = [one for change in changes.values() for one in change.rated()]
    task, stop = _watched(backbone, task, head, rated, options)
    epochs, rate = schedule_of(options, task.train_rows)
    steps = steps_of(options, task.train_rows)
    optimizer = adamw(head, backbone.width, rated, rate, moments)
    first, end = (round(part * steps) for part in span)
    factor = triangle(steps, options.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(first + step))
    if not any(one.numel() for group in optimizer.param_groups for one in group["params"]):
        return Trained(loss=float("nan"), steps=0)
    modules = {site: adapted(backbone.site(site), change) for site, change in changes.items()}
    draw = torch.Generator().manual_seed(options.seed)
    mean, done = float("nan"), 0
    with injected(backbone, modules), recomputed(backbone, options.checkpointing):
        if stop is not None and first > 0:
            stop.ended()  # what it starts with may be the best
        for epoch in range(1, epochs + 1):
            for chosen in epoch_batches(task.train, options.batch_size, draw):
                done += 1
                if not first < done <= end:
                    continue
                value = _step(backbone, task, head, chosen, options, optimizer, done)
                schedule.step()
                mean = smoothed(mean, value) if done > first + 1 else value
                if progress is not None:
                    progress(Progress(epoch, epochs, done, steps, mean))
                time.sleep(options.pace)
            if (stop is not None and done > first and stop.ended()) or done >= end:
                break
        if stop is not None:
            stop.restore()
    return Trained(loss=mean, steps=min(done, end) - first, moments=optimizer.state)


def _watched(
    backbone: Backbone, task: PreparedTask, head: nn.Module, rated: Iterable[Rated], options: TrainingOptions
) -> tuple[PreparedTask, EarlyStop | None]:
    """Return the task without the rows that are held out, and what watches them; as it is where nothing is."""
    if options.patience is None:
        return task, None
    task, rows = held_out(task, options.seed)
    numbers = [*head.parameters(), *(one.parameter for one in rated)]
    return task, EarlyStop(backbone, task, rows, head, numbers, options.patience)


def _step(
    backbone: Backbone,
    task: PreparedTask,
    head: nn.Module,
    rows: Sequence[int],
    options: TrainingOptions,
    optimizer: torch.optim.Optimizer,
    number: int,
) -> float:
    """Take the step of that number; return the mean loss of its rows before it."""
    optimizer.zero_grad()
    value = 0.0
    for loss in part_losses(backbone, task.at(number), head, rows, options):
        loss.backward()  # type: ignore[no-untyped-call]
        value += loss.item()
    require_finite_loss(value, number, task)
    optimizer.step()
    return value


def require_finite_loss(loss: float, step: int, task: PreparedTask) -> None:
    """Refuse the loss of a step after which nothing that is trained is worth anything.

    Raises:
        ConfigError: NaN or infinity.
    """
    if not math.isfinite(loss):
        raise ConfigError(
            f"task {task.config.name!r}: expected a finite loss, got {loss} in step {step}; lower learning_rate, or "
            f"look for extreme numbers in {task.config.train}"
        )


def smoothed(mean: float | None, value: float) -> float:
    """Return the running mean of the loss after one more value."""
    return value if mean is None else _SMOOTHING * mean + (1 - _SMOOTHING) * value


def adamw(
    head: nn.Module, width: int, rated: Iterable[Rated], learning_rate: float, moments: Moments | None = None
) -> torch.optim.Optimizer:
    """Return AdamW over a head and the rated parameters, with one group for each multiple of the learning rate.

    Args:
        head: its parameters.
        width: of the backbone: how long the columns of the head are.
        rated: the other parameters.
        learning_rate: before the multiples.
        moments: what is known of some parameters already. Without it Adam's first steps are about as large as the
            learning rate in every number, whatever the gradient, which undoes much of what a head has learned.
    """
    groups: dict[float, list[nn.Parameter]] = {rate_for(width): list(head.parameters())}
    for one in rated:
        if one.parameter.numel():
            groups.setdefault(one.multiple, []).append(one.parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": learning_rate * multiple} for multiple, params in groups.items()], weight_decay=0.0
    )
    for parameter in (one for params in groups.values() for one in params):
        if moments is not None and parameter in moments:
            optimizer.state[parameter] = dict(moments[parameter])
    return optimizer


def triangle(steps: int, warmup: float) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: up to one over ``warmup`` of the steps, then down."""
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        return (step + 1) / rise if step < rise else max(0.0, (steps - step) / max(1, steps - rise))

    return factor
