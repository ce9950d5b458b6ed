"""``share-client check``: try a tasks file to its end before anything joins, and say what would leave.

Every task is read whole, trained for two steps on one batch, the most expensive one that its rows can make, by the
code that trains for real, and measured on the most expensive test rows. So what is found is what would have been found
later: the memory is the largest that a step takes, and the tensors are those that would be sent. Nothing is written and
nothing is sent.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from share_client.faults import in_words
from share_client.sharing import EVERYBODY
from share_client.tasks_file import Examined, TaskConfig, examine_tasks
from share_client.watched import dropped_tasks
from share_core.errors import ConfigError, FedshareError

if TYPE_CHECKING:
    from torch import Tensor

    from share_client.kinds import Rows
    from share_client.training import Backbone, PreparedTask, TrainingOptions
    from share_core.privacy import Declaration
    from share_core.types import Space, Update

STEPS = 2
"""Steps that are tried: the first one of a process is slower than all others."""
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class TensorLine:
    """One tensor, for people."""

    name: str
    """As in the payload, or as in the head."""
    dtype: str
    """``F32`` and so on in a payload, ``float32`` and so on in a private head."""
    shape: tuple[int, ...]
    """Its shape."""
    bytes: int
    """Bytes of its values."""


@dataclass(frozen=True)
class TaskCheck:
    """What trying one task showed."""

    name: str
    """Its name in the file."""
    kind: str
    """Its kind."""
    train_rows: int
    """Rows it trains on."""
    test_rows: int
    """Rows it is measured on."""
    classes: int
    """Number of classes; 0 for kinds that have none."""
    steps: int
    """Steps of the whole training."""
    seconds_per_step: float
    """Wall-clock seconds of the tried step, which took the most expensive rows."""
    seconds: float
    """Estimate for the whole training: a step is taken to cost what its rows cost (tokens of a text)."""
    peak_bytes: int
    """Most memory while trying it: of the device with CUDA, else of this whole process."""
    payload_bytes: int
    """Bytes of the whole payload, with its header."""
    most_bytes: int | None
    """Bytes that all tensors together have at most, where what is learned decides on ranks; None: as in ``leaves``."""
    leaves: tuple[TensorLine, ...]
    """Every tensor of the payload."""
    stays: tuple[TensorLine, ...]
    """Every tensor of the head where it is private; it is written only under the client directory."""
    goes_to: str
    """Whose task it is and who may contribute, in words; empty for a private one of the own organisation."""
    reports: str | None
    """The metric on the test rows that is reported to the hub, or None."""
    plan: Mapping[str, str]
    """By site: rank of the coefficients, number of new directions, and why, in one line."""
    privacy: str
    """What the update declares of noise, or ``none``."""
    notes: tuple[str, ...]
    """What is allowed and yet worth knowing."""


@dataclass(frozen=True)
class Checked:
    """What is wrong with a tasks file, and what its tasks would do."""

    path: str
    """The tasks file."""
    backbone: str | None
    """Name of the backbone; None where it could not be loaded."""
    device: str | None
    """Where it was tried."""
    version: int
    """Version of the space that was tried in; 0 is the empty space."""
    problems: tuple[str, ...]
    """Everything that is wrong, one sentence each, in the order it was found."""
    untried: tuple[str, ...]
    """Tasks that could not be tried because there was no backbone."""
    tasks: tuple[TaskCheck, ...]
    """Every task that could be tried."""


def check_tasks(path: Path, snapshot: Path | None = None, tell: Callable[[str], None] = lambda _: None) -> Checked:
    """Try every task of a tasks file, dropped folders included; problems are returned, not raised.

    Args:
        path: the tasks file.
        snapshot: a version of the space to try in, written by ``share-client snapshot``. None: the empty space.
        tell: is given a line before each part of the work.
    """
    examined = examine_tasks(path)
    problems = [str(problem) for problem in examined.problems]
    backbone, space = _prepare_space(examined, snapshot, problems, tell)
    tried: list[TaskCheck] = []
    tasks = (*examined.tasks, *_dropped(examined, path, problems))
    for config in tasks:
        if backbone is None or space is None:
            break
        tell(f"trying task {config.name!r}")
        problem = _try(config, backbone, space, tried)
        if problem is not None:
            problems.append(problem if str(path) in problem else f"{path}: {problem}")
    return Checked(
        path=str(path),
        backbone=None if backbone is None else backbone.name,
        device=None if backbone is None else str(backbone.device),
        version=0 if space is None else space.version,
        problems=tuple(problems),
        untried=() if space is not None else tuple(config.name for config in tasks),
        tasks=tuple(tried),
    )


def _dropped(examined: Examined, path: Path, problems: list[str]) -> tuple[TaskConfig, ...]:
    """Return the tasks in the watched directory; why other folders are none goes to ``problems``."""
    if examined.backbone is None:
        return ()
    found = dropped_tasks(examined.file(path), None)
    problems.extend(found.remarks)
    return found.tasks


def _prepare_space(
    examined: Examined, snapshot: Path | None, problems: list[str], tell: Callable[[str], None]
) -> tuple[Backbone | None, Space | None]:
    """Load the backbone and the space to try in; what is wrong goes to ``problems``."""
    if examined.backbone is None:
        return None, None
    from share_client.training import load_backbone
    from share_core.fingerprint import describe_space
    from share_core.space import empty_space
    from share_core.wire import decode_snapshot

    backbone: Backbone | None = None
    try:
        tell("loading the backbone")
        backbone = load_backbone(examined.backbone, examined.device)
        spec = describe_space(backbone.name, backbone.site_weights())
        space = empty_space(spec) if snapshot is None else decode_snapshot(snapshot.read_bytes(), spec)
    except FedshareError as error:
        where = "" if backbone is None else f"{snapshot}: this version of the space does not fit the backbone: "
        problems.append(f"{where}{error}")
        return backbone, None
    except OSError as error:
        problems.append(f"{snapshot}: cannot read this version of the space: {error}")
        return backbone, None
    return backbone, space


def _try(config: TaskConfig, backbone: Backbone, space: Space, tried: list[TaskCheck]) -> str | None:
    """Append what trying one task shows; return instead what is wrong with it."""
    import torch

    try:
        tried.append(_tried(config, backbone, space))
    except FedshareError as error:
        return _named(str(error), config)
    except torch.OutOfMemoryError:
        remedy = "raise accumulate, set checkpointing = true, or lower max_length"
        return _named(f"out of memory on the device in the first step; {remedy}", config)
    except MemoryError:
        return _named("out of memory; lower rows or test_rows, or raise accumulate", config)
    except OSError as error:
        why = error.strerror or type(error).__name__  # not its file, whose name may be what a row holds
        return _named(f"a file that it needs cannot be read ({why}); see that it is there and may be read", config)
    except Exception as error:  # of a kind of the client's own, for example
        return _named(f"failed with {in_words(error)}", config)
    return None


def _named(problem: str, config: TaskConfig) -> str:
    """Return a problem that names its task."""
    name = f"task {config.name!r}"
    return problem if name in problem else f"{name}: {problem}"


def _tried(config: TaskConfig, backbone: Backbone, space: Space) -> TaskCheck:
    """Read one task whole, train it for two steps, and look at what came of it."""
    from share_client.trainer import LocalTask
    from share_client.training import TrainingOptions, declare, prepare_task, train_in_space
    from share_client.training.evaluation import judged_rows
    from share_client.training.in_space import has_bases
    from share_client.training.options import steps_of
    from share_core.privacy import CoefficientNoise, SampleNoise
    from share_core.space import update_adapter
    from share_core.tensorfile import describe_tensors
    from share_core.wire import encode_update

    task = prepare_task(config, backbone)
    declared = declare(config, task.train_rows)
    notes = _notes(task)
    if isinstance(declared, CoefficientNoise) and not has_bases(space):
        space = _with_bases(space, TrainingOptions.of(config).pseudo_rank)
        notes.append(
            "noise on coefficients needs a space with bases: tried with random ones; give --space for the true shapes"
        )
    one = _one_batch(task)
    asked = TrainingOptions.of(config)
    options = replace(asked, epochs=STEPS, pace=0.0)
    trial = replace(declared, steps=STEPS, sample_rate=1.0) if isinstance(declared, SampleNoise) else declared
    watch = _Watch(backbone)
    result = train_in_space(backbone, one, space, f"check/{config.name}", options, watch.step, declared=trial)
    if result.steps == 0:
        raise _nothing_trained(config, space, options)
    judged_rows(backbone, one, update_adapter(result.update, space.bases), result.head)
    peak = watch.peak()
    payload = encode_update(result.update)
    steps = declared.steps if isinstance(declared, SampleNoise) else steps_of(asked, task.train_rows)
    if isinstance(declared, CoefficientNoise):
        steps *= 2  # the head is trained once more on what the noise left
    return TaskCheck(
        name=config.name,
        kind=config.kind,
        train_rows=task.train_rows,
        test_rows=task.test_rows,
        classes=len(task.classes),
        steps=steps,
        seconds_per_step=watch.seconds_per_step,
        seconds=watch.setup + steps * (config.pace + watch.seconds_per_step * _relative_cost(task, one)),
        peak_bytes=peak,
        payload_bytes=len(payload),
        most_bytes=_most_bytes(options, declared, space, result.update),
        leaves=tuple(
            TensorLine(t["name"], t["dtype"], tuple(t["shape"]), t["bytes"]) for t in describe_tensors(payload)
        ),
        stays=() if result.update.head else tuple(_line(name, tensor) for name, tensor in result.head.items()),
        goes_to=_goes_to(config),
        reports=task.kind.metric if LocalTask(config.name, "", config).reports else None,
        plan={site: str(one) for site, one in result.plan.items()},
        privacy="none" if declared is None else repr(declared),
        notes=tuple(notes),
    )


def _nothing_trained(config: TaskConfig, space: Space, options: TrainingOptions) -> ConfigError:
    """Return the error for a task of which nothing is learned: no new directions, no coefficients and no head."""
    why = (
        f"with directions = 0 only coefficients are, which need bases, and version {space.version} of the space has "
        "none; give --space for a version that has, or take directions out"
        if options.pseudo_rank
        else "directions = 0 and pseudo_rank = 0 leave nothing; take one of them out"
    )
    return ConfigError(f"task {config.name!r}: expected something that is trained, got no step: {why}")


def _goes_to(config: TaskConfig) -> str:
    """Return whose task it is and with whom it is shared; empty where nobody else has to do with it."""
    if config.owner:
        return (
            f"into the task {config.owner}/{config.name} of {config.owner}, who must have made it and named your "
            "organisation; never made from here"
        )
    if not config.share_with:
        return ""
    whom = "everybody in the federation" if config.share_with == (EVERYBODY,) else ", ".join(config.share_with)
    return f"shared with {whom}: as the first update says it, a later change of share_with changes nothing"


def _most_bytes(options: TrainingOptions, declared: Declaration | None, space: Space, update: Update) -> int | None:
    """Return what the numbers of an update may take; None where their shapes are fixed before the training."""
    from share_client.training.adaptation import budget_of, budgeted

    budget = budget_of(space.bases, options, declared)
    if budget is None:
        return None
    return 4 * (budgeted(space.bases, budget) + sum(tensor.numel() for tensor in update.head.values()))


def _notes(task: PreparedTask) -> list[str]:
    """Return what is allowed and yet worth knowing."""
    notes = []
    if task.config.test is None:
        notes.append(f"{task.test_rows} of {task.config.train.name} are held out as test rows and never trained on")
    if task.config.rows is not None and task.train_rows == task.config.rows:
        notes.append(f"rows = {task.config.rows}: the rest of the training rows is not used")
    if task.train_rows < task.config.batch_size:
        notes.append(f"one batch ({task.config.batch_size}) holds all {task.train_rows} training rows")
    return notes


def _one_batch(task: PreparedTask) -> PreparedTask:
    """Return the task with no rows but those of the most expensive batches there can be."""
    from share_client.training.evaluation import rows_at_once

    train, test = _dearest(task.train, task.config.batch_size), _dearest(task.test, rows_at_once(task.config))
    return replace(task, train=train, test=test)


def _dearest(rows: Rows, count: int) -> Rows:
    from share_client.kinds.kind import Chosen

    lengths = rows.lengths()
    return Chosen(rows, sorted(range(len(lengths)), key=lambda row: -lengths[row])[:count])


def _relative_cost(task: PreparedTask, one: PreparedTask) -> float:
    """Return what an average step costs in units of the tried one."""
    steps = -(-task.train_rows // task.config.batch_size)
    return sum(task.train.lengths()) / steps / sum(one.train.lengths())


def _with_bases(space: Space, rank: int) -> Space:
    """Return a space with random orthonormal bases of ``rank`` columns, or as many as a site has."""
    import torch

    from share_core.types import SiteBasis

    draw = torch.Generator().manual_seed(0)

    def columns(rows: int) -> Tensor:
        orthonormal: Tensor = torch.linalg.qr(torch.randn(rows, min(rank, rows), generator=draw)).Q
        return orthonormal

    bases = {
        site: SiteBasis(columns(basis.left.shape[0]), columns(basis.right.shape[0]))
        for site, basis in space.bases.items()
    }
    return replace(space, bases=bases)


def _line(name: str, tensor: Tensor) -> TensorLine:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorLine(name, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


class _Watch:
    """Time and memory from when it is made."""

    def __init__(self, backbone: Backbone) -> None:
        self._device = backbone.device
        self._times = [time.monotonic()]
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # The kernel then counts the peak from here on; where it may not be told, the peak is that of the process.
            try:
                _CLEAR.write_text("5")
            except OSError:
                return

    def step(self, progress: object) -> None:
        """Note that a step is done."""
        self._times.append(time.monotonic())

    @property
    def setup(self) -> float:
        """Seconds before the second step, which the first one is part of."""
        return self._times[1] - self._times[0]

    @property
    def seconds_per_step(self) -> float:
        """Seconds of the last step."""
        return self._times[-1] - self._times[-2]

    def peak(self) -> int:
        """Return the most bytes in use since this was made."""
        if self._device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        try:
            lines = _STATUS.read_text(encoding="ascii").splitlines()
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def print_check(found: Checked, tell: Callable[[str], None]) -> None:
    """Print what :func:`check_tasks` returned, for people."""
    for task in found.tasks:
        classes = f", {task.classes} classes" if task.classes else ""
        tell(f"task {task.name} ({task.kind}): {task.train_rows} training and {task.test_rows} test rows{classes}")
        tell(
            f"  about {_duration(task.seconds)} for {task.steps} steps ({task.seconds_per_step:.3f} s for the most "
            f"expensive), at most {task.peak_bytes / 2**20:.0f} MiB of memory on {found.device}; noise: {task.privacy}"
        )
        if task.goes_to:
            tell(f"  {task.goes_to}")
        for note in task.notes:
            tell(f"  note: {note}")
        tell("  sends at each site, as two steps see it:")
        for site, plan in task.plan.items():
            tell(f"    {site}  {plan}")
        if task.most_bytes is not None:
            tell(
                f"  leaves at most {task.most_bytes} bytes of numbers in version {found.version} of the space; what is "
                "learned decides on the ranks. As two steps see it:"
            )
        else:
            tell(f"  leaves, {task.payload_bytes} bytes with the header, in version {found.version} of the space:")
        _print_tensors(task.leaves, tell)
        tell(f"  reports to the hub: {f'{task.reports} on the test rows' if task.reports else 'no metric'}")
        if task.stays:
            tell("  stays here, the private head:")
            _print_tensors(task.stays, tell)
    if len(found.tasks) > 1:
        tell(f"all tasks: about {_duration(sum(task.seconds for task in found.tasks))}")
    for number, problem in enumerate(found.problems, start=1):
        tell(f"problem {number}: {problem}")
    if found.untried:
        tell(f"not tried, as there is no backbone or no space to try in: {', '.join(found.untried)}")
    tell(f"{found.path}: {len(found.problems) or 'no'} problem{'s' * (len(found.problems) != 1)}")


def _print_tensors(tensors: Sequence[TensorLine], tell: Callable[[str], None]) -> None:
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "1"
        tell(f"    {tensor.name}  {tensor.dtype}  {shape}  {tensor.bytes} bytes")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
