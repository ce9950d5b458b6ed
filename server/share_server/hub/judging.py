"""What the organisations say of one shared task, and who of them counts.

The content of a shared task in a version is a function of the newest update of every organisation and of the policy,
and of nothing else: so a replay of the journal finds the same. An update that does not count is set aside before it is
merged. One that was merged while too few organisations were there to judge it stays merged, and has no weight from the
version on in which the others outvote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from share_core.mixing import Contribution, contributor_weights, mix_adapters
from share_core.robust.agreement import geometry
from share_core.robust.influence import owner_of
from share_core.robust.verdicts import WHOLE, Verdict, Voice, judge, set_aside
from share_core.types import Adapter
from share_server.hub.policy import StepPolicy
from share_server.store.records import UpdateRow


@dataclass(frozen=True)
class Said:
    """One update with what it says."""

    row: UpdateRow
    """The update."""
    adapter: Adapter
    """Its ambient factors."""


def newest_of_each(said: Iterable[Said]) -> list[Said]:
    """Return the newest of every organisation, in ingest order."""
    newest: dict[str, Said] = {}
    for one in sorted(said, key=lambda one: one.row.ingest_seq):
        newest[one.row.new.organisation] = one
    return sorted(newest.values(), key=lambda one: one.row.ingest_seq)


@dataclass(frozen=True)
class Background:
    """What a shared task is mixed with and judged by, of the versions before."""

    older: Sequence[Said] = ()
    """What the organisations have said of it, the newest of each."""
    start: Adapter | None = None
    """What it began with; None where it has just begun, or where nobody is judged."""


def verdicts_on(said: Sequence[Said], start: Adapter | None, policy: StepPolicy) -> list[Verdict]:
    """Return one verdict for each, where ``said`` is what :func:`newest_of_each` gives for one task."""
    if not policy.robust.filters:
        return [WHOLE] * len(said)
    return judge(_voices(said), geometry([one.adapter for one in said], start), policy.robust)


def to_set_aside(background: Background, fresh: Sequence[Said], policy: StepPolicy) -> dict[str, str]:
    """Return which of the ``fresh`` updates of one task may not be merged, by id, with the reason."""
    out: dict[str, str] = {}
    while fresh and policy.robust.filters:
        said = newest_of_each([*background.older, *fresh])
        new = {one.row.new.update_id for one in fresh}
        lie = geometry([one.adapter for one in said], background.start)
        found = set_aside(_voices(said), lie, [one.row.new.update_id in new for one in said], policy.robust)
        out.update({said[i].row.new.update_id: reason for i, reason in found.items()})
        # An earlier update of the same organisation may come forward when its newest is set aside.
        fresh = [one for one in fresh if one.row.new.update_id not in out]
        if not found:
            break
    return out


@dataclass(frozen=True)
class Counted:
    """One update that counts in the content of a shared task."""

    said: Said
    """The update."""
    verdict: Verdict
    """What the others make of it."""
    weight: float
    """Its share; those of all that count sum to 1."""


def counted_of(said: Sequence[Said], start: Adapter | None, version: int, policy: StepPolicy) -> list[Counted]:
    """Return who counts and how much: one voice per organisation, less the older it is.

    Args:
        said: what :func:`newest_of_each` gives. Where nobody is judged, the adapters are not looked at.
        start: what the task began with.
        version: the version it is merged into, from which ages count.
        policy: how it is weighed and judged.
    """
    verdicts = verdicts_on(said, start, policy)
    counted = [(one, verdict) for one, verdict in zip(said, verdicts, strict=True) if verdict.counts]
    contributions = [
        Contribution(one.row.new.organisation, {}, max(0, version - one.row.new.base_version), one.row.new.rows)
        for one, _ in counted
    ]
    weights = contributor_weights(contributions, policy.rule, policy.rows_cap)
    return [Counted(one, verdict, weight) for weight, (one, verdict) in zip(weights, counted, strict=True)]


def mean_of(said: Sequence[Said], start: Adapter | None, version: int, policy: StepPolicy, rank: int) -> Adapter:
    """Return the mixture of what counts, cut to ``rank`` per site; see :func:`counted_of` for the rest."""
    counted = counted_of(said, start, version, policy)
    parts = [(one.weight * one.verdict.factor, one.said.adapter) for one in counted]
    # A single one that is whole stays as it was sent, whatever its rank.
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else mix_adapters(parts, rank)


def _voices(said: Sequence[Said]) -> list[Voice]:
    return [
        Voice(row.new.organisation, row.new.organisation == owner_of(row.new.task_id), row.released)
        for row in (one.row for one in said)
    ]
