"""What a version would do to the tasks that are there already."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from share_core.ledger import TaskLedger
from share_core.robust.influence import owner_of


@dataclass(frozen=True)
class Harm:
    """The stored task that suffers most."""

    task_id: str
    """The task."""
    added: float
    """By how much its relative error grows."""
    limit: float
    """By how much it may grow."""

    def __str__(self) -> str:
        """Say it in a sentence."""
        return (
            f"it would add {self.added:.3f} to the relative error of task {self.task_id}, more than {self.limit:g}: "
            "raise k_max, or release it if that is worth it"
        )


def harm_of(
    before: Mapping[str, TaskLedger],
    after: Mapping[str, TaskLedger],
    merged: Collection[str],
    organisations: Collection[str],
    limit: float,
) -> Harm | None:
    """Return the worst harm of a candidate version to a task of somebody who has no part in it; None within the limit.

    What a compaction removes from a core is orthogonal to what it keeps, so the growth of a bound is at most 1, and a
    limit of 1 holds nothing (MATH section 2, error ledger).

    Args:
        before: ledger of the version before.
        after: ledger of the candidate.
        merged: ids of the tasks that the candidate merges: their content is new, so nothing was lost.
        organisations: who submitted what it merges. A task of the only one of them is its own to harm.
        limit: most growth of the relative error.
    """
    if limit >= 1:
        return None
    worst: Harm | None = None
    for task in sorted(before.keys() & after.keys() - set(merged)):
        if set(organisations) <= {owner_of(task)}:
            continue
        added = after[task].bound - before[task].bound
        if added > limit and (worst is None or added > worst.added):
            worst = Harm(task, added, limit)
    return worst
