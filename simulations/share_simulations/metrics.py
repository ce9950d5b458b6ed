"""Accuracy, forgetting, bytes and staleness of a federation, from what the hub recorded. Pure functions.

An accuracy that was not measured is ``None`` everywhere and stays ``None``: a mean over a set with a gap is a
gap. Accuracies are fractions, bytes are payload bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Row = tuple[float | None, ...]

BYTES_PER_SCALAR: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Width of the dtypes an update may be encoded in."""


@dataclass(frozen=True)
class Measured:
    """One accuracy that a client reported."""

    task: str
    version: int
    value: float
    rows: int = 0


@dataclass(frozen=True)
class Submission:
    """One durable update as the hub's journal knows it."""

    task: str
    member: str
    base_version: int
    version: int
    """Version that holds it; 0 while it is not merged."""
    coefficients: int
    """Bytes of core factors."""
    directions: int
    """Bytes of residual factors."""
    heads: int = 0
    """Bytes of heads that were shared."""
    envelope: int = 0
    """Bytes of header and alignment."""
    received_unix_ms: int = 0
    relative_error: float = 0.0

    @property
    def staleness(self) -> int | None:
        """How many versions were published between the base version and the merge; None while not merged."""
        return self.version - 1 - self.base_version if self.version else None


@dataclass(frozen=True)
class Site:
    """Shape of one adapted weight."""

    d_out: int
    d_in: int


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracy of every task (columns) at a sequence of versions (rows)."""

    tasks: tuple[str, ...]
    versions: tuple[int, ...]
    values: tuple[Row, ...]
    """values[row][column]; None where nothing was measured."""

    def at(self, version: int, task: str) -> float | None:
        """Return one cell; None where nothing was measured or the version is no row of this matrix."""
        if version not in self.versions or task not in self.tasks:
            return None
        return self.values[self.versions.index(version)][self.tasks.index(task)]


def accuracy_matrix(measured: Iterable[Measured], tasks: Sequence[str], newest: int) -> AccuracyMatrix:
    """Return the accuracy of ``tasks`` at the versions 1 to ``newest``, shape (newest, len(tasks))."""
    cells = {(m.version, m.task): m.value for m in measured}
    versions = tuple(range(1, newest + 1))
    return AccuracyMatrix(tuple(tasks), versions, tuple(tuple(cells.get((v, t)) for t in tasks) for v in versions))


def last_merges(submissions: Iterable[Submission]) -> dict[str, int]:
    """Return for every merged task the version of its own last merge, in the order of those merges."""
    last: dict[str, int] = {}
    for submission in submissions:
        if submission.version:
            last[submission.task] = max(last.get(submission.task, 0), submission.version)
    return dict(sorted(last.items(), key=lambda item: item[1]))


def task_matrix(matrix: AccuracyMatrix, last: Mapping[str, int]) -> AccuracyMatrix:
    """Return the T x T matrix: row i is the state after the last merge of the i-th task, columns likewise.

    Tasks merged in one version get equal rows. Unmerged tasks are left out.
    """
    order = [t for t in last if t in matrix.tasks]
    values = tuple(tuple(matrix.at(last[row], column) for column in order) for row in order)
    return AccuracyMatrix(tuple(order), tuple(last[t] for t in order), values)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the arithmetic mean; None for no values or where one is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return sum(known) / len(known) if known else None


def own_accuracy(matrix: AccuracyMatrix, last: Mapping[str, int]) -> dict[str, float | None]:
    """Return the accuracy of every task right after its own last merge."""
    return {t: matrix.at(last[t], t) if t in last else None for t in matrix.tasks}


def final_accuracy(matrix: AccuracyMatrix) -> dict[str, float | None]:
    """Return the accuracy of every task at the newest version."""
    newest = matrix.versions[-1] if matrix.versions else 0
    return {t: matrix.at(newest, t) for t in matrix.tasks}


def forgetting_per_task(own: Mapping[str, float | None], final: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return accuracy after the own last merge minus final accuracy per task; negative: it got better."""
    result: dict[str, float | None] = {}
    for task, before in own.items():
        after = final.get(task)
        result[task] = None if before is None or after is None else before - after
    return result


def backward_transfer(
    own: Mapping[str, float | None], final: Mapping[str, float | None], last: Mapping[str, int], newest: int
) -> float | None:
    """Return BWT: final minus own accuracy, averaged over the tasks that something was merged after.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017), equation 3: the last task is left out, because
    nothing came after it. With one task, or with all merged at once, there is nothing to transfer back to:
    None.
    """
    earlier = [t for t, version in last.items() if version < newest]
    change = forgetting_per_task(own, final)
    value = mean(change.get(t) for t in earlier)
    return None if value is None else -value + 0.0


def lora_bytes(sites: Iterable[Site], rank: int, dtype: str) -> int:
    """Return the bytes of one LoRA adapter: (d_out + d_in) * rank scalars per site."""
    return sum((s.d_out + s.d_in) * rank for s in sites) * BYTES_PER_SCALAR[dtype]


@dataclass(frozen=True)
class Traffic:
    """Payload bytes of a whole run, split as DESIGN asks for: up, down, heads, envelope and total."""

    up: int
    """Coefficients and directions of every submission."""
    up_lora: int
    """One LoRA adapter per submission, same dtype."""
    heads: int
    """Shared heads, up and down."""
    envelope: int
    down: int
    """Deltas and snapshots sent to the clients."""

    @property
    def total(self) -> int:
        """Everything that passed, without the LoRA baseline."""
        return self.up + self.heads + self.envelope + self.down


def traffic(
    submissions: Iterable[Submission],
    down: int,
    sites: Iterable[Site],
    lora_rank: int,
    dtype: str,
    down_heads: int = 0,
) -> Traffic:
    """Count the bytes of ``submissions`` and what as many plain LoRA uploads would have taken."""
    updates = tuple(submissions)
    return Traffic(
        up=sum(s.coefficients + s.directions for s in updates),
        up_lora=len(updates) * lora_bytes(sites, lora_rank, dtype),
        heads=sum(s.heads for s in updates) + down_heads,
        envelope=sum(s.envelope for s in updates),
        down=down,
    )


def staleness_histogram(submissions: Iterable[Submission]) -> dict[int, int]:
    """Return how many merged updates had which staleness."""
    seen = Counter(s.staleness for s in submissions if s.staleness is not None)
    return dict(sorted(seen.items()))
