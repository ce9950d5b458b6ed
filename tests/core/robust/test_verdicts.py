"""Who counts: honest crowds are left alone, the known attacks are set aside, and every rule is needed for one of them.

A crowd is drawn as it looks on real tasks: everybody starts at the stored adapter, the changes are mostly noise of
their own, and a small part is common (docs/evidence/attacks.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_core.errors import ConfigError
from share_core.robust import verdicts
from share_core.robust.agreement import Geometry, cosines
from share_core.robust.policy import OFF, RobustPolicy, robust_policy
from share_core.robust.verdicts import Voice, judge, set_aside

ON = RobustPolicy(filter="cosine")
WIDTH = 2048
"""Numbers of one adapter: so many that noise of different clients is nearly orthogonal, as on a real backbone."""


def crowd(count: int, seed: int, common: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return the stored adapter (d,) and honest contributions (n, d)."""
    draw = torch.Generator().manual_seed(seed)
    stored, lesson = torch.randn(2, WIDTH, generator=draw, dtype=torch.float64)
    noise = torch.randn(count, WIDTH, generator=draw, dtype=torch.float64)
    return stored, stored + 0.6 * (common * lesson + (1 - common**2) ** 0.5 * noise)


def lie(said: Tensor, stored: Tensor | None) -> Geometry:
    changes = None if stored is None else (said - stored) @ (said - stored).T
    return Geometry(said @ said.T, changes)


def voices(count: int) -> list[Voice]:
    return [Voice(f"org{i}", owner=i == 0) for i in range(count)]


def counted(said: Tensor, stored: Tensor | None, policy: RobustPolicy = ON) -> list[bool]:
    return [verdict.counts for verdict in judge(voices(len(said)), lie(said, stored), policy)]


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 20), st.integers(0, 2**30), st.floats(0.2, 0.9), st.booleans())
def test_an_honest_crowd_is_left_as_it_is(count: int, seed: int, common: float, began: bool) -> None:
    stored, said = crowd(count, seed, common)
    found = judge(voices(count), lie(said, stored if began else None), ON)
    assert all(verdict.factor == 1 and not verdict.reason for verdict in found)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 12), st.integers(0, 2**30))
def test_people_with_nothing_in_common_are_left_alone(count: int, seed: int) -> None:
    """Unlike data: their directions are orthogonal. Nobody is an outlier of no crowd."""
    draw = torch.Generator().manual_seed(seed)
    assert all(counted(torch.randn(count, WIDTH, generator=draw, dtype=torch.float64), None))


def hostile(kind: str, stored: Tensor, said: Tensor, number: int) -> Tensor:
    """Return what ``number`` colluders send."""
    mean = (said - stored).mean(0)
    noise = torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found: dict[str, Tensor] = {
        "sign of all": -said[:number],
        "sign of the change": stored - (said[:number] - stored),
        "scale": stored + 1e6 * (said[:number] - stored),
        "long": 40 * said[:number],
        "random": noise,
        "random change": stored + 0.6 * noise,
        "against the mean": (stored - 4 * mean).expand(number, -1),
        "against the mean, norm-matched": (stored - mean * (0.6 * stored.norm() / mean.norm())).expand(number, -1),
    }
    return found[kind]


KINDS = [
    "sign of all",
    "sign of the change",
    "scale",
    "long",
    "random",
    "random change",
    "against the mean",
    "against the mean, norm-matched",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [2, 4, 6])
def test_colluders_of_up_to_30_percent_are_set_aside_and_nobody_else(kind: str, number: int) -> None:
    for seed in range(3):
        stored, said = crowd(20 - number, seed)
        everybody = torch.cat([said, hostile(kind, stored, said, number)])
        assert counted(everybody, stored) == [True] * (20 - number) + [False] * number


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 2**30))
def test_the_order_does_not_matter(order: list[int], seed: int) -> None:
    stored, said = crowd(7, seed)
    everybody = torch.cat([said, hostile("sign of the change", stored, said, 2)])
    plain = judge(voices(9), lie(everybody, stored), ON)
    mixed = judge([voices(9)[i] for i in order], lie(everybody[order], stored), ON)
    assert [verdict.counts for verdict in mixed] == [plain[i].counts for i in order]


def test_a_long_one_is_cut_and_a_far_too_long_one_is_set_aside() -> None:
    _, said = crowd(6, 1)
    length = said.norm(dim=1).median()
    for times, factor in ((1.2, 1.0), (3.0, 0.5), (40.0, 0.0)):
        said[5] = said[5] / said[5].norm() * times * length
        verdict = judge(voices(6), lie(said, None), ON)[5]
        assert verdict.factor == pytest.approx(factor, rel=0.05)
    assert "its length is" in verdict.reason and "more than 10 times the median" in verdict.reason


def test_what_repeats_the_stored_task_is_no_stray() -> None:
    stored, said = crowd(8, 2)
    said[3] = stored  # the owner's own first update, say
    assert all(counted(said, stored))


def test_few_have_no_majority_and_are_cut_to_what_the_owner_says() -> None:
    _, said = crowd(3, 3)
    said[1], said[2] = -said[1], 1e6 * said[2]
    found = judge(voices(3), lie(said, None), ON)
    assert [verdict.factor for verdict in found[:2]] == [1.0, 1.0]
    assert found[2].factor * float(said[2].norm()) == pytest.approx(10 * float(said[0].norm()), rel=1e-9)
    nobody = [Voice(f"org{i}") for i in range(3)]
    assert all(verdict.factor == 1 for verdict in judge(nobody, lie(said, None), ON)), (
        "without the owner nothing is known"
    )


def test_a_small_contribution_does_not_shorten_the_owner() -> None:
    _, said = crowd(2, 4)
    said[1] *= 1e-9
    assert [verdict.factor for verdict in judge(voices(2), lie(said, None), ON)] == [1.0, 1.0]


def test_what_is_released_counts_whole() -> None:
    stored, said = crowd(8, 5)
    said[7] = -4 * said[7]
    own = [*voices(7), Voice("org7", released=True)]
    assert judge(own, lie(said, stored), ON)[7].factor == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**30), st.lists(st.booleans(), min_size=12, max_size=12))
def test_what_is_left_counts_when_it_is_judged_by_itself(seed: int, fresh: list[bool]) -> None:
    """So a replay, which sees only what was merged, finds that all of it counts."""
    draw = torch.Generator().manual_seed(seed)
    stored, said = crowd(9, seed, 0.2)
    everybody = torch.cat([said, stored + 3 * torch.randn(3, WIDTH, generator=draw, dtype=torch.float64)])
    found = lie(everybody, stored)
    out = set_aside(voices(12), found, fresh, ON)
    assert set(out) <= {i for i in range(12) if fresh[i]}
    left = [i for i in range(12) if i not in out]
    for i, verdict in zip(left, judge([voices(12)[i] for i in left], found.among(left), ON), strict=True):
        assert verdict.counts or not fresh[i]


def splitters(stored: Tensor, said: Tensor) -> Tensor:
    """Return what four colluders send who agree with half of the crowd and with each other, against the other half."""
    changes = said - stored
    half = len(said) // 2
    made = changes[:half].sum(0) - changes[half:].sum(0)
    sent: Tensor = stored + made * (changes.norm(dim=1).median() / made.norm())
    return sent.expand(4, -1)


def test_colluders_cannot_make_strays_of_the_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, said = crowd(16, 6)
    everybody = torch.cat([said, splitters(stored, said)])
    assert counted(everybody, stored)[:16] == [True] * 16

    def to_the_mean(gram: Tensor) -> Tensor:
        angles = cosines(gram) - torch.eye(len(gram), dtype=gram.dtype)
        mean: Tensor = angles.mean(dim=1)
        return mean

    monkeypatch.setattr(verdicts, "agreements", to_the_mean)  # the planted bug: a sum, in which clones count fully
    assert counted(everybody, stored)[:16] != [True] * 16


PLANTED: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "no length": ("long", lambda m: None),
    "no change": ("sign of the change", lambda m: None),
    "no direction": ("random", lambda m: m.setattr(verdicts, "_strays", lambda *_: {})),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_every_rule_is_needed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bugs: each rule taken away lets one attack pass, which the test above finds."""
    kind, plant = PLANTED[bug]
    stored, said = crowd(14, 0)
    everybody = torch.cat([said, hostile(kind, stored, said, 6)])
    assert counted(everybody, stored) == [True] * 14 + [False] * 6
    plant(monkeypatch)
    policy = RobustPolicy(filter="cosine", norm=1e9) if bug == "no length" else ON
    began = None if bug in ("no change", "no length") else stored
    assert counted(everybody, began, policy) != [True] * 14 + [False] * 6


def test_judging_once_is_not_enough() -> None:
    """The planted bug: what is left after one pass need not count by itself, and a replay would mix something else."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1.0, 1.0, 1.0, 11.0, 11.0, 115.0, 115.0], dtype=torch.float64)
    said = torch.nn.functional.normalize(torch.randn(7, WIDTH, generator=draw, dtype=torch.float64)) * lengths[:, None]
    found = lie(said, None)
    out = set_aside(voices(7), found, [True] * 7, ON)
    once = {i for i, verdict in enumerate(judge(voices(7), found, ON)) if not verdict.counts}
    assert once == {5, 6} and set(out) == {3, 4, 5, 6}


def test_limits_that_cannot_work_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"filter": "krum"}, {"organisations": 2}, {"cosine": 1.0}, {"clip": 0.5}]
    for values in [*wrong, {"clip": 20.0}, {"influence": 0.0}, {"past": 1.5}]:
        with pytest.raises(ConfigError, match="expected"):
            RobustPolicy(**values)
    assert robust_policy(None) == OFF and not OFF.filters
