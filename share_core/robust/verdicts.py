"""Who of several contributors to one task counts, and how much: a function of what they say and of nothing else.

Every contributor is one organisation and has one voice, however many members or rows it declares. The rules, in order:

1. **Length.** A contribution of more than ``norm`` times the median length is set aside; one of more than ``clip``
   times is cut to that length.
2. **Direction.** How much a contribution agrees is the median of its cosines to all others. Where that is below
   ``cosine`` times the usual one (the median over all contributions) it is set aside. A vote and not a sum: colluders
   who send the same agree with each other as much as they like and move nobody's median, while a centre that they are
   part of would make strays of the honest, who agree little.
3. **Direction of the change.** The same for what each changes in the adapter that the task began with. Everybody who
   trains a stored task starts from it, so that all contributions agree before they have learned anything; what they
   learn is mostly their own noise, and only the little that is common tells who works against the others.

Where the others hardly agree among themselves (a usual agreement below :data:`TELLING`), rules 2 and 3 say nothing:
honest organisations with unlike data look like that, and nobody can be called an outlier of no crowd. With fewer than
``organisations`` contributors no majority can be told from a minority: then the owner of the task is the yardstick, and
the others are cut to ``norm`` times its length.

What no such rule can find: a minority that stays inside the spread of the honest ones (Baruch et al., 2019, "A Little
Is Enough"), or that learns what the others learn and one thing more (backdoors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from share_core.robust.agreement import Geometry, cosines, norms_of
from share_core.robust.policy import RobustPolicy

TELLING = 0.05
"""Below this usual agreement a crowd has no common direction to measure anybody against."""

STILL = 1e-3
"""A change shorter than this share of the median change has no direction: whoever sends it repeats what is there."""


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


def judge(voices: Sequence[Voice], said: Geometry, policy: RobustPolicy) -> list[Verdict]:
    """Return one verdict per contribution.

    Args:
        voices: who says it.
        said: how what they say lies to each other, see :func:`share_core.robust.agreement.geometry`.
        policy: the limits.
    """
    norms = norms_of(said.whole)
    if len(voices) < policy.organisations:
        verdicts = _against_owner(voices, norms, policy.norm)
    else:
        verdicts = _against_majority(said, norms, policy)
    return [WHOLE if voice.released else verdict for voice, verdict in zip(voices, verdicts, strict=True)]


def set_aside(voices: Sequence[Voice], said: Geometry, fresh: Sequence[bool], policy: RobustPolicy) -> dict[int, str]:
    """Return which fresh contributions are to be set aside, by place, with the reason.

    Judged again without them until nobody else is: so what is left counts when it is judged by itself, as it is when
    the version is made, and when it is made again. An older contribution that does not count any more stays where it is
    and has no weight.
    """
    left = list(range(len(voices)))
    out: dict[int, str] = {}
    while left:
        verdicts = judge([voices[i] for i in left], said.among(left), policy)
        bad = {i: verdict.reason for i, verdict in zip(left, verdicts, strict=True) if fresh[i] and not verdict.counts}
        if not bad:
            break
        out.update(bad)
        left = [i for i in left if i not in bad]
    return out


def _against_owner(voices: Sequence[Voice], norms: Tensor, most: float) -> list[Verdict]:
    own = next((float(norm) for voice, norm in zip(voices, norms, strict=True) if voice.owner), 0.0)
    if own == 0:
        return [WHOLE] * len(voices)
    return [WHOLE if voice.owner else _cut(float(norm), most * own) for voice, norm in zip(voices, norms, strict=True)]


def _against_majority(said: Geometry, norms: Tensor, policy: RobustPolicy) -> list[Verdict]:
    usual = _median(norms)
    cut = [_cut(norm, policy.clip * usual) for norm in norms.tolist()]
    found = list(cut)
    for i, norm in enumerate(norms.tolist()):
        if norm > policy.norm * usual:
            found[i] = _aside(f"its length is {norm:.3g}, more than {policy.norm:g} times the median {usual:.3g}")
    for what, gram in (("its cosine", said.whole), ("the cosine of what it changes", said.changes)):
        for i, reason in _strays(gram, what, policy.cosine).items() if gram is not None else ():
            found[i] = found[i] if found[i].reason else _aside(reason)
    # Where every single one is an outlier there is no crowd to be an outlier of.
    return found if any(verdict.counts for verdict in found) else cut


def _strays(gram: Tensor, what: str, share: float) -> dict[int, str]:
    """Return which contributions point away from the others, with the reason."""
    agreement = agreements(gram)
    usual = _median(agreement)
    if usual < TELLING:
        return {}
    norms = norms_of(gram)
    still = STILL * _median(norms)
    return {
        i: f"{what} to the others is {cosine:.3f} in the median, less than {share:g} times the usual {usual:.3f}"
        for i, (cosine, norm) in enumerate(zip(agreement.tolist(), norms.tolist(), strict=True))
        if cosine < share * usual and norm > still
    }


def agreements(gram: Tensor) -> Tensor:
    """Return the median (n,) of every contribution's cosines to the others."""
    angles = cosines(gram)
    return gram.new_tensor([_median(torch.cat([own[:i], own[i + 1 :]])) for i, own in enumerate(angles)])


def _median(values: Tensor) -> float:
    """Return the middle value, or the mean of the two in the middle."""
    ordered: list[float] = sorted(values.tolist())
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _cut(norm: float, most: float) -> Verdict:
    return WHOLE if norm <= most else Verdict(most / norm)


def _aside(reason: str) -> Verdict:
    return Verdict(0.0, reason)
