"""Who of several contributors to one task counts, and how much: a function of what they say and of nothing else.

Every contributor is one organisation and has one voice, however many members or rows it declares. The rules, in order:

1. **Length.** A contribution of more than ``norm`` times the median length is set aside; one of more than ``clip``
   times is cut to that length.
2. **Direction.** The centre is that of the best agreeing majority: the contribution whose median cosine to all others
   is highest, and those nearest to it, half of all and one more in total. Colluders are a minority, so that the median
   over all others keeps them from electing themselves. A contribution whose cosine to the centre of the others in that
   majority is below ``cosine`` times the usual one (the median over all) is set aside.
3. **Distance.** The same for the distance to that centre, above ``distance`` times the usual one: all contributions
   begin at the stored task, so that they agree before they have learned anything, and one that pushes hard against the
   others is found by how far it went.

Where the others hardly agree among themselves (a usual cosine below :data:`TELLING`), rules 2 and 3 say nothing: honest
organisations with unlike data look like that, and nobody can be called an outlier of no crowd. With fewer than
``organisations`` contributors no majority can be told from a minority: then the owner of the task is the yardstick, and
the others are cut to ``norm`` times its length.

What no such rule can find: a minority that stays inside the spread of the honest ones (Baruch et al., 2019, "A Little
Is Enough"), or that moves little in a direction nobody measures (backdoors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.robust.agreement import cosines, norms_of
from share_core.robust.policy import RobustPolicy

TELLING = 0.1
"""Below this usual cosine a crowd has no common direction to measure anybody against."""


@dataclass(frozen=True)
class Voice:
    """One contribution to a shared task."""

    organisation: str
    """Who answers for it; no two voices of one task are of the same."""
    owner: bool = False
    """Whether that is the organisation that made the task."""
    released: bool = False
    """Whether the operator has let it pass: it is neither cut nor set aside."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one contribution."""

    factor: float
    """What its dW is multiplied by, in (0, 1]; 0: it does not count."""
    reason: str = ""
    """Why it does not count, with the figure and the limit; empty if it does."""

    @property
    def counts(self) -> bool:
        """Whether it is part of the task."""
        return self.factor > 0


WHOLE = Verdict(1.0)
"""It counts as it is."""


def judge(voices: Sequence[Voice], gram: Tensor, policy: RobustPolicy) -> list[Verdict]:
    """Return one verdict per contribution.

    Args:
        voices: who says it.
        gram: (n, n) inner products of what is said, see :func:`share_core.robust.agreement.inner_products`.
        policy: the limits.
    """
    if not policy.filters:
        return [WHOLE] * len(voices)
    norms = norms_of(gram)
    if len(voices) < policy.organisations:
        verdicts = _against_owner(voices, norms, policy.norm)
    else:
        verdicts = _against_majority(gram, norms, policy)
    return [WHOLE if voice.released else verdict for voice, verdict in zip(voices, verdicts, strict=True)]


def _against_owner(voices: Sequence[Voice], norms: Tensor, most: float) -> list[Verdict]:
    own = next((float(norm) for voice, norm in zip(voices, norms, strict=True) if voice.owner), 0.0)
    if own == 0:
        return [WHOLE] * len(voices)
    return [WHOLE if voice.owner else _cut(float(norm), most * own) for voice, norm in zip(voices, norms, strict=True)]


def _against_majority(gram: Tensor, norms: Tensor, policy: RobustPolicy) -> list[Verdict]:
    usual_norm = _median(norms)
    agreement, distance = to_centre(gram)
    usual, apart = _median(agreement), _median(distance)
    found: list[Verdict] = []
    for norm, cosine, away in zip(norms.tolist(), agreement.tolist(), distance.tolist(), strict=True):
        if norm > policy.norm * usual_norm:
            found.append(_aside(f"its length is {norm:.3g}", f"{policy.norm:g} times the median of {usual_norm:.3g}"))
        elif usual >= TELLING and cosine < policy.cosine * usual:
            found.append(
                _aside(
                    f"its cosine to the others is {cosine:.3f}",
                    f"{policy.cosine:g} times the usual {usual:.3f}",
                    "below",
                )
            )
        elif usual >= TELLING and away > policy.distance * apart:
            found.append(
                _aside(
                    f"its distance from the others is {away:.3g}", f"{policy.distance:g} times the usual {apart:.3g}"
                )
            )
        else:
            found.append(_cut(norm, policy.clip * usual_norm))
    if not any(verdict.counts for verdict in found):  # no crowd at all: nobody is an outlier of it
        return [_cut(norm, policy.clip * usual_norm) for norm in norms.tolist()]
    return found


def set_aside(voices: Sequence[Voice], gram: Tensor, fresh: Sequence[bool], policy: RobustPolicy) -> dict[int, str]:
    """Return which fresh contributions are to be set aside, by place, with the reason.

    Judged again without them until nobody else is: so what is left counts when it is judged by itself, as it is when
    the version is made, and when it is made again. An older contribution that does not count any more stays where it is
    and has no weight.
    """
    left = list(range(len(voices)))
    out: dict[int, str] = {}
    while left:
        verdicts = judge([voices[i] for i in left], gram[left][:, left], policy)
        bad = {i: verdict.reason for i, verdict in zip(left, verdicts, strict=True) if fresh[i] and not verdict.counts}
        if not bad:
            break
        out.update(bad)
        left = [i for i in left if i not in bad]
    return out


def to_centre(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return every contribution's cosine (n,) to the centre of the best agreeing majority, and its distance (n,).

    A member of the majority is compared with the others in it, so that nobody agrees with itself. The centre of the
    cosine is the sum of unit vectors; that of the distance is the mean, after every contribution was cut to the median
    length.
    """
    members = majority(gram)
    norms = norms_of(gram)
    usual = _median(norms)
    cut = torch.where(norms > usual, usual / torch.where(norms > 0, norms, 1.0), 1.0)
    angles, lengths = cosines(gram), gram * cut[:, None] * cut[None, :]
    agreement, distance = torch.zeros(len(gram), dtype=gram.dtype), torch.zeros(len(gram), dtype=gram.dtype)
    for i in range(len(gram)):
        others = [j for j in members if j != i]
        length = float(angles[others][:, others].sum().clamp_min(0).sqrt())
        agreement[i] = float(angles[i, others].sum()) / length if length > 0 else 0.0
        cross = float(lengths[i, others].mean())
        distance[i] = math.sqrt(max(0.0, float(lengths[i, i]) - 2 * cross + float(lengths[others][:, others].mean())))
    return agreement, distance


def majority(gram: Tensor) -> list[int]:
    """Return the best agreeing ``n // 2 + 1`` contributions: the one with the highest median cosine and its nearest."""
    angles = cosines(gram)
    count = len(gram)
    medians = [_median(torch.cat([angles[i, :i], angles[i, i + 1 :]])) for i in range(count)]
    seed = max(range(count), key=lambda i: medians[i])
    nearest = sorted(range(count), key=lambda j: (j != seed, -float(angles[seed, j]), j))
    return sorted(nearest[: count // 2 + 1])


def _median(values: Tensor) -> float:
    """Return the middle value, or the mean of the two in the middle."""
    ordered: list[float] = sorted(values.tolist())
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _cut(norm: float, most: float) -> Verdict:
    return WHOLE if norm <= most else Verdict(most / norm)


def _aside(figure: str, limit: str, relation: str = "more than") -> Verdict:
    return Verdict(0.0, f"{figure}, {relation} {limit}")
