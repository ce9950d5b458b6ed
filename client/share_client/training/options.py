"""Settings and results of training, as frozen values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from share_client.tasks_file import TaskConfig
from share_client.training.plan import SitePlan
from share_core.privacy import Declaration
from share_core.types import Adapter, Update

DEFAULT_EPOCHS = 3
"""Passes over the training rows where there are enough of them."""

LEAST_STEPS = 40
"""Steps below which few rows are passed over more often: the first steps are spent on the head (docs/adr/0021)."""


DEFAULT_RATE = 2e-3
"""Adam's step for a LoRA factor and the head."""

SHORT_STEPS = 60
"""Steps below which the default rate is :data:`SHORT_RATE` times as high: as many as few rows come to."""

SHORT_RATE = 2.0
"""See :data:`SHORT_STEPS`, and docs/adr/0021."""


@dataclass(frozen=True)
class TrainingOptions:
    """How one task is trained. The defaults serve digits-vit and MiniLM alike."""

    epochs: int | None = None
    """Passes over the training rows. None: :data:`DEFAULT_EPOCHS`, or enough for :data:`LEAST_STEPS`."""
    batch_size: int = 32
    """Rows in one step."""
    learning_rate: float | None = None
    """Adam's step for a LoRA factor and the head; that of the core is derived, see :mod:`~.factors`. None:
    :data:`DEFAULT_RATE`, or more where the steps are few: :func:`schedule_of`."""
    directions: int | None = None
    """Free directions phi at each site. None: see :mod:`~.adaptation`."""
    pseudo_rank: int = 8
    """Rank p of the core at each site; never more than the subspace has."""
    seed: int = 0
    """Seed of initialisation and of the order of the rows."""
    pace: float = 0.0
    """Seconds slept after each step, to simulate slow hardware."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from zero; then it falls linearly to zero."""
    gradient_batches: int = 4
    """Batches whose gradient chooses the free directions."""
    precision: str = "fp32"
    """``fp32``; ``bf16``: matrix products in bfloat16 and trained numbers in float32; ``auto``: bf16 on CUDA."""
    accumulate: int = 1
    """Parts into which the rows of one step are cut; the result is that of one part, the memory that of the largest."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass instead of being kept."""
    budget: float | None = None
    """Share of a LoRA's numbers that is sent, chosen by what was learned; None: see :func:`~.adaptation.budget_of`."""
    patience: int | None = None
    """Passes without a lower loss on held-out rows after which training ends, see :mod:`~.early`. None: never."""

    @classmethod
    def of(cls, task: TaskConfig) -> TrainingOptions:
        """Return the options that an entry of ``tasks.toml`` asks for."""
        return cls(
            epochs=task.epochs,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            directions=task.directions,
            pseudo_rank=cls.pseudo_rank if task.pseudo_rank is None else task.pseudo_rank,
            seed=task.seed,
            pace=task.pace,
            precision=task.precision,
            accumulate=task.accumulate,
            checkpointing=task.checkpointing,
            patience=task.patience,
            budget=task.budget,
        )


def schedule_of(options: TrainingOptions, rows: int) -> tuple[int, float]:
    """Return the passes over ``rows`` training rows and the learning rate: what is asked for, or the defaults."""
    epochs = options.epochs or max(DEFAULT_EPOCHS, -(-LEAST_STEPS // _per_pass(options, rows)))
    usual = DEFAULT_RATE if epochs * _per_pass(options, rows) >= SHORT_STEPS else SHORT_RATE * DEFAULT_RATE
    return epochs, options.learning_rate or usual


def steps_of(options: TrainingOptions, rows: int) -> int:
    """Return the steps of all passes over ``rows`` training rows."""
    return schedule_of(options, rows)[0] * _per_pass(options, rows)


def _per_pass(options: TrainingOptions, rows: int) -> int:
    return -(-rows // options.batch_size)


@dataclass(frozen=True)
class Progress:
    """How far a training is; handed out after every step."""

    epoch: int
    """From 1."""
    epochs: int
    """Epochs in all."""
    step: int
    """Steps taken."""
    steps: int
    """Steps in all."""
    loss: float
    """Loss of late: an exponential mean."""


ProgressCallback = Callable[[Progress], None]
"""Called after every step; an exception it raises ends the training and leaves the backbone clean."""


@dataclass(frozen=True)
class TrainResult:
    """A task trained in a space."""

    update: Update
    """What to submit. Its ``head`` is filled only where the task says ``share_head``."""
    head: Mapping[str, Tensor]
    """The private head on the CPU, by parameter name."""
    loss: float
    """Last exponential mean of the training loss."""
    steps: int
    """Optimiser steps taken."""
    seconds: float
    """Wall-clock seconds of the whole training."""
    trained_numbers: int
    """Trained numbers in cores and free directions, heads not counted."""
    declared: Declaration | None = None
    """Clipping and noise in the update; None if there is none."""
    plan: Mapping[str, SitePlan] = field(default_factory=dict)
    """What was trained at every site, and why."""


@dataclass(frozen=True)
class LoraResult:
    """A task trained as separate LoRA, the baseline."""

    adapter: Adapter
    """Ambient factors on the CPU, scale folded into ``out``. Empty when only the head was trained."""
    head: Mapping[str, Tensor]
    """The head on the CPU, by parameter name."""
    loss: float
    """Last exponential mean of the training loss."""
    steps: int
    """Optimiser steps taken."""
    seconds: float
    """Wall-clock seconds of the whole training."""
    trained_numbers: int
    """Trained numbers in the factors, heads not counted."""


@dataclass(frozen=True)
class EvaluationResult:
    """One measurement on a task's test rows."""

    metric: str
    """Name of the metric, for example ``accuracy``."""
    value: float
    """Its value; a fraction for accuracy."""
    rows: int
    """Test rows it was measured on."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Other figures by name, such as a median error; see :meth:`share_client.kinds.Kind.details`."""
