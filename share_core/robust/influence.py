"""How much one organisation may weigh when a space has to choose which directions it keeps.

A compaction minimises ``sum_t w_t ||C_t - P_o P_o^T C_t P_i P_i^T||^2`` with ``w_t = 1 / ||dW_t||^2``: the size of a
task gives it no weight (an update of scale 10^6 weighs as much as any other), but the number of tasks does. Whoever
submits a hundred private tasks of one subspace would take that subspace for itself. So the weights of an organisation
are multiplied by one factor where its tasks together would weigh more than the cap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

FAIR_SHARES = 2
"""The cap is never below this many times the equal share: few organisations cannot all stay below a small cap."""


def owner_of(task_id: str) -> str:
    """Return the organisation that answers for a task: what stands before the slash."""
    return task_id.partition("/")[0]


def influence_factors(tasks: Collection[str], most: float) -> dict[str, float]:
    """Return what each organisation's weights are multiplied by, in (0, 1].

    With ``n_o`` tasks of organisation o and factors ``f_o``, every share ``f_o n_o / sum f n`` is at most ``c``, the
    larger of ``most`` and :data:`FAIR_SHARES` equal shares; organisations below the cap keep the factor 1. When the
    largest q are capped, the whole is ``T = (sum of the others) / (1 - q c)`` and each of them has ``c T``.

    Args:
        tasks: ids of all tasks that take part.
        most: largest share of one organisation, in (0, 1].
    """
    counts = Counter(owner_of(task) for task in tasks)
    factors = dict.fromkeys(counts, 1.0)
    cap = max(most, FAIR_SHARES / len(counts)) if counts else 1.0
    if cap >= 1:
        return factors
    rest = counts.total()
    capped: list[str] = []
    for organisation, count in counts.most_common():
        whole = rest / (1 - len(capped) * cap)
        if count <= cap * whole:
            break
        capped.append(organisation)
        rest -= count
    whole = rest / (1 - len(capped) * cap)
    for organisation in capped:
        factors[organisation] = cap * whole / counts[organisation]
    return factors
