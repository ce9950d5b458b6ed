"""MATH section 4 for streamed merges, each property with planted bugs it must catch.

Planted bugs: a canonical form that forgets one factor's gauge, half a projection, one direction too few kept, a budget
overspent, the strongest directions dropped in place of the weakest, cores that do not follow a compaction or grow in
it, a reflector with the wrong sign, a compaction that charges nobody, chunks that forget what they lost, maps that are
not composed, tasks that weigh by their norm, a transition without its rotation, tasks that stay after they are
dropped, and directions that are in use trimmed away.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import share_core.append
import share_core.streaming.chunks
import share_core.streaming.compact
import share_core.streaming.fold
import share_core.streaming.project
import share_core.streaming.reflect
import share_core.streaming.select
import share_core.streaming.view
from share_core.ledger import TaskLedger, measure
from share_core.space import advance, task_adapter
from share_core.streaming.fold import Folded, drop, fold
from share_core.streaming.state import StreamPolicy, StreamState, empty_stream
from share_core.streaming.view import bases_of, ledger_of, refitted, space_of, stream_of, trimmed
from share_core.types import Adapter, Delta, Factors, SiteSpec, Space

SITES = {
    "a.query": SiteSpec("a.query", 24, 18, ""),
    "b.query": SiteSpec("b.query", 24, 18, ""),
    "a.value": SiteSpec("a.value", 14, 30, ""),
}


@dataclass(frozen=True)
class Case:
    """Shapes, ranks and scales of a sequence of adapters, and the seed that fills them."""

    tasks: int
    rank: int
    scale_exponent: int
    seed: int
    k_max: int = 64
    window: int = 16


LOOSE_CASES = st.builds(
    Case,
    tasks=st.integers(2, 6),
    rank=st.integers(1, 4),
    scale_exponent=st.integers(-6, 6),
    seed=st.integers(0, 2**31),
)
TIGHT_CASES = st.builds(
    Case,
    tasks=st.integers(6, 12),
    rank=st.integers(2, 4),
    scale_exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
    k_max=st.integers(5, 9),
    window=st.integers(1, 4),
)
LOOSE = Case(tasks=4, rank=3, scale_exponent=0, seed=7)
TIGHT = Case(tasks=12, rank=3, scale_exponent=0, seed=7, k_max=6, window=2)


def draw_adapters(case: Case) -> dict[str, Adapter]:
    """Return adapters of unequal ranks, norms over two decades and decaying spectra, one with a missing site."""
    g = torch.Generator().manual_seed(case.seed)
    adapters: dict[str, Adapter] = {}
    for task in range(case.tasks):
        own: dict[str, Factors] = {}
        for number, site in enumerate(SITES.values()):
            rank = max(1, case.rank - (task + number) % 2)
            scale = 10.0 ** (case.scale_exponent + task % 3 - 1)
            out = torch.randn(site.d_out, rank, generator=g) * 0.6 ** torch.arange(rank) * scale
            own[site.name] = Factors(out, torch.randn(site.d_in, rank, generator=g))
        if task == 1:
            del own["b.query"]
        adapters[f"t{task}"] = own
    return adapters


def policy_of(case: Case, tau: float = 0.0) -> StreamPolicy:
    return StreamPolicy(k_max=case.k_max, tau=tau, window=case.window)


def fold_all(adapters: Mapping[str, Adapter], policy: StreamPolicy) -> tuple[StreamState, list[Folded]]:
    state, folds = empty_stream(SITES), []
    for task, adapter in adapters.items():
        folds.append(fold(state, task, adapter, policy))
        state = folds[-1].state
    return state, folds


def dense(factors: Factors | None, site: SiteSpec) -> Tensor:
    """The obvious slow way: the whole matrix in float64."""
    if factors is None:
        return torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
    return factors.out.double() @ factors.in_.double().T


def dense_error(original: Adapter, found: Adapter) -> float:
    lost2 = whole2 = 0.0
    for name, site in SITES.items():
        a, b = dense(original.get(name), site), dense(found.get(name), site)
        lost2 += float((a - b).square().sum())
        whole2 += float(a.square().sum())
    return math.sqrt(lost2 / whole2) if whole2 else math.sqrt(lost2)


def stored(state: StreamState) -> dict[str, Adapter]:
    space = space_of(state)
    return {task: task_adapter(space, task, torch.float64) for task in space.cores}


def measured(state: StreamState, adapters: Mapping[str, Adapter]) -> dict[str, TaskLedger]:
    found = stored(state)
    return {task: measure(adapters[task], found[task]) for task in found}


# --- the properties ------------------------------------------------------------------------------------------------


def gauge(case: Case) -> None:
    """1: merging (B G, G^-1 A) gives the same dW as merging (B, A)."""
    adapters = draw_adapters(case)
    g = torch.Generator().manual_seed(case.seed + 1)
    turned: dict[str, dict[str, Factors]] = {}
    for task, adapter in adapters.items():
        turned[task] = {}
        for site, f in adapter.items():
            mix = torch.eye(f.rank) * 3 + torch.randn(f.rank, f.rank, generator=g) * 0.5
            turned[task][site] = Factors(f.out @ mix, f.in_ @ torch.linalg.inv(mix).T)
    plain, other = (stored(fold_all(a, policy_of(case))[0]) for a in (adapters, turned))
    for task in adapters:
        assert dense_error(plain[task], other[task]) < 1e-4
        assert dense_error(adapters[task], other[task]) < 1e-5 or case.k_max < 64


def lossless(case: Case) -> None:
    """2: while k fits every task reconstructs to rounding, and old tasks do not move by a single bit."""
    adapters = draw_adapters(case)
    state, folds = fold_all(adapters, policy_of(case))
    for task, adapter in stored(state).items():
        assert dense_error(adapters[task], adapter) < 1e-5
    for earlier, later in itertools.pairwise(folds):
        before, after = bases_of(earlier.state), bases_of(later.state)
        for site, basis in before.items():
            assert torch.equal(after[site].left[:, : basis.k_out], basis.left)
            assert torch.equal(after[site].right[:, : basis.k_in], basis.right)


def budget(case: Case) -> None:
    """Each task stays within tau, and the subspace is no larger than without a budget."""
    adapters = draw_adapters(case)
    exact, _ = fold_all(adapters, policy_of(case))
    state, _ = fold_all(adapters, policy_of(case, tau=0.3))
    for task, ledger in measured(state, adapters).items():
        assert ledger.bound <= 0.3 + 1e-5, task
    for site, basis in bases_of(state).items():
        assert basis.k_out <= bases_of(exact)[site].k_out


def order(case: Case) -> None:
    """3: any order of arrival ends within 5 % of the best that is known at the same k, over all tasks."""
    adapters = draw_adapters(case)
    names = list(adapters)
    errors = []
    for arrival in (names, names[::-1]):
        state, _ = fold_all({task: adapters[task] for task in arrival}, policy_of(case))
        errors.append(_weighted(state, adapters))
    reference = _weighted(_alternating(adapters, case.k_max), adapters)
    assert max(errors) <= 1.05 * reference + 1e-5, (errors, reference)


def _weighted(bases: StreamState | Mapping[str, tuple[Tensor, Tensor]], adapters: Mapping[str, Adapter]) -> float:
    """Root mean square over tasks of the relative error that the bases allow."""
    pairs = (
        {s: (b.left.double(), b.right.double()) for s, b in bases_of(bases).items()}
        if isinstance(bases, StreamState)
        else bases
    )
    total = 0.0
    for adapter in adapters.values():
        fitted = {
            s: Factors(pairs[s][0] @ (pairs[s][0].T @ f.out.double()), pairs[s][1] @ (pairs[s][1].T @ f.in_.double()))
            for s, f in adapter.items()
        }
        total += dense_error(adapter, fitted) ** 2
    return math.sqrt(total / len(adapters))


def _alternating(adapters: Mapping[str, Adapter], k: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The obvious slow way: HOOI on dense matrices of all tasks at once."""
    found = {}
    whole = {t: sum(float(dense(f, SITES[s]).square().sum()) for s, f in a.items()) for t, a in adapters.items()}
    for name, site in SITES.items():
        mats = [dense(a.get(name), site) / math.sqrt(whole[t]) for t, a in adapters.items()]
        right = torch.linalg.svd(torch.cat(mats))[2][:k].T
        for _ in range(60):
            left = torch.linalg.svd(torch.cat([m @ right for m in mats], 1))[0][:, :k]
            right = torch.linalg.svd(torch.cat([left.T @ m for m in mats]))[2][:k].T
        found[name] = (left, right)
    return found


def ledger(case: Case) -> None:
    """4: the bound is never below the measured error, at any version; a measured ledger is the error to 1e-6."""
    adapters = draw_adapters(case)
    _, folds = fold_all(adapters, policy_of(case))
    for folded in folds:
        bounds = ledger_of(folded.state)
        for task, exact in measured(folded.state, adapters).items():
            truth = dense_error(adapters[task], stored(folded.state)[task])
            assert abs(exact.bound - truth) < 1e-6
            assert bounds[task].bound >= truth, (task, bounds[task].bound, truth)


def replay(case: Case) -> None:
    """5: replaying all transitions from version 0 gives the current bases."""
    _, folds = fold_all(draw_adapters(case), policy_of(case))
    space = Space(0, bases_of(empty_stream(SITES)), {})
    for folded in folds:
        space = advance(space, Delta(space.version + 1, folded.transition, {}))
    for site, basis in bases_of(folds[-1].state).items():
        assert space.bases[site].left.shape == basis.left.shape
        if basis.k_out:
            assert float((space.bases[site].left - basis.left).abs().max()) < 1e-4
            assert float((space.bases[site].right - basis.right).abs().max()) < 1e-4


def contraction(case: Case) -> None:
    """7: no merge enlarges a task's norm."""
    adapters = draw_adapters(case)
    norms = {task: measure(adapter, {}).norm for task, adapter in adapters.items()}
    _, folds = fold_all(adapters, policy_of(case))
    for folded in folds:
        for task, adapter in stored(folded.state).items():
            assert measure(adapter, {}).norm <= norms[task] * (1 + 1e-5)


def orthonormal(case: Case) -> None:
    """8, in short: bases stay orthonormal; see test_endurance for ten thousand merges."""
    _, folds = fold_all(draw_adapters(case), policy_of(case))
    for folded in folds:
        assert departure(folded.state) < 1e-5


def departure(state: StreamState) -> float:
    worst = 0.0
    for basis in bases_of(state).values():
        for side in (basis.left.double(), basis.right.double()):
            if side.shape[1]:
                worst = max(worst, float((side.T @ side - torch.eye(side.shape[1])).abs().max()))
    return worst


def fairness(case: Case) -> None:
    """Every task's relative error counts the same: scaling one task changes nobody's error."""
    adapters = draw_adapters(case)
    loud = {**adapters, "t0": {s: Factors(f.out * 1e4, f.in_) for s, f in adapters["t0"].items()}}
    plain = measured(fold_all(adapters, policy_of(case))[0], adapters)
    other = measured(fold_all(loud, policy_of(case))[0], loud)
    for task in adapters:
        assert abs(plain[task].bound - other[task].bound) < 2e-2, task


def removal(case: Case) -> None:
    """Dropping tasks moves no other, trimming loses nothing, and the Grams forget what was dropped."""
    adapters = draw_adapters(case)
    state, _ = fold_all(adapters, policy_of(case))
    before = stored(state)
    rest = drop(state, ["t0", "t3"])
    slim = trimmed(rest)
    assert list(stored(slim)) == [task for task in adapters if task not in ("t0", "t3")]
    for task, adapter in stored(slim).items():
        assert dense_error(before[task], stored(rest)[task]) < 2e-6
        assert dense_error(before[task], adapter) < 1e-5
    sizes = {site: (b.k_out, b.k_in) for site, b in bases_of(slim).items()}
    assert all(k[0] <= bases_of(state)[site].k_out for site, k in sizes.items())
    again = fold(rest, "t0", adapters["t0"], policy_of(case)).state
    assert set(stored(again)) == set(adapters) - {"t3"}


PROPERTIES_LOOSE = [gauge, lossless, budget, ledger, replay, contraction, orthonormal, removal]
PROPERTIES_TIGHT = [gauge, order, ledger, replay, contraction, orthonormal, fairness, removal]


@pytest.mark.parametrize("check", PROPERTIES_LOOSE, ids=lambda f: f.__name__)
def test_property_holds_while_k_fits(check: Callable[[Case], None]) -> None:
    settings(max_examples=12, deadline=None)(given(LOOSE_CASES)(check))()


@pytest.mark.parametrize("check", PROPERTIES_TIGHT, ids=lambda f: f.__name__)
def test_property_holds_beyond_the_cap(check: Callable[[Case], None]) -> None:
    settings(max_examples=12, deadline=None)(given(TIGHT_CASES)(check))()


# --- planted bugs --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted(where: str, bug: Any) -> Iterator[None]:
    with mock.patch(where, bug):
        yield


REAL_CANONICAL = share_core.streaming.project.canonical_stack
REAL_CHOOSE = share_core.append.choose_directions
REAL_GROW = share_core.streaming.compact.grow
REAL_TAKEN = share_core.streaming.chunks.taken
REAL_ROWS = share_core.streaming.reflect.reflect_rows
REAL_BASIS = share_core.streaming.reflect.reflect_basis


def _gauge_of_out_only(out: Tensor, in_: Tensor) -> Any:
    form = REAL_CANONICAL(out, torch.nn.functional.normalize(in_, dim=-2))
    return replace(form, s=form.s * in_.double().norm(dim=-2).mean())


def _one_too_few(strengths: Mapping[str, list[float]], budget2: float) -> tuple[dict[str, int], float]:
    counts, spent = REAL_CHOOSE(strengths, budget2)
    return {site: max(0, n - 1) for site, n in counts.items()}, spent


def _spending_more(strengths: Mapping[str, list[float]], budget2: float) -> tuple[dict[str, int], float]:
    counts, _ = REAL_CHOOSE(strengths, 3 * budget2)
    return counts, 0.0


def _strongest(gram: Tensor, count: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[..., -count:]


def _unmoved(rows: Tensor, by: Any, consume: bool = False) -> Tensor:
    return rows[..., : by.z.shape[-2], :]


def _charging_nobody(out: Tensor, in_: Tensor) -> Tensor:
    return torch.zeros(out.shape[:2], dtype=torch.float64)


def _another_tasks_cores(chunk: Any, index: list[int]) -> Any:
    own = REAL_TAKEN(chunk, index)
    return replace(own, out=own.out.roll(1, dims=1))


def _weighing_all_alike(stack: Any, by: Any, *rest: Any) -> Any:
    return REAL_GROW(stack, replace(by, weight=1.0), *rest)


def _louder(rows: Tensor, by: Any, consume: bool = False) -> Tensor:
    return 1.5 * REAL_ROWS(rows, by)


def _backwards(base: Tensor, extra: Tensor, by: Any) -> Tensor:
    return REAL_BASIS(base, extra, replace(by, z=-by.z))


def _half_projected(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x - a @ b / 2


@pytest.mark.parametrize(
    ("check", "case", "where", "bug"),
    [
        (gauge, LOOSE, "share_core.streaming.fold.canonical_stack", _gauge_of_out_only),
        (lossless, LOOSE, "share_core.streaming.fold.choose_directions", _one_too_few),
        (budget, LOOSE, "share_core.streaming.fold.choose_directions", _spending_more),
        (order, TIGHT, "share_core.streaming.select.weakest", _strongest),
        (ledger, TIGHT, "share_core.streaming.compact.reflect_rows", _unmoved),
        (contraction, TIGHT, "share_core.streaming.compact.reflect_rows", _louder),
        (ledger, TIGHT, "share_core.streaming.compact._product2", _charging_nobody),
        (ledger, TIGHT, "share_core.streaming.chunks._norm2", _charging_nobody),
        (ledger, TIGHT, "share_core.streaming.chunks._followed", lambda current, *rest: current),
        (replay, TIGHT, "share_core.streaming.fold._dense", lambda by, polished: None),
        (fairness, TIGHT, "share_core.streaming.fold.grow", _weighing_all_alike),
        (removal, TIGHT, "share_core.streaming.chunks.taken", _another_tasks_cores),
        (removal, TIGHT, "share_core.streaming.view.FLOOR", 0.5),
        (orthonormal, TIGHT, "share_core.streaming.compact.reflect_basis", _backwards),
        (orthonormal, LOOSE, "share_core.streaming.project.minus_product", _half_projected),
    ],
)
def test_property_catches_planted_bug(check: Callable[[Case], None], case: Case, where: str, bug: Any) -> None:
    check(case)
    with planted(where, bug), pytest.raises(AssertionError):
        check(case)


# --- 9: edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3])
def test_zero_and_rank_zero_adapters_change_nothing(rank: int) -> None:
    state, _ = fold_all(draw_adapters(TIGHT), policy_of(TIGHT))
    zero = {"a.query": Factors(torch.zeros(24, rank), torch.zeros(18, rank))}
    after = fold(state, "zero", zero, policy_of(TIGHT))
    assert space_of(after.state).cores["zero"] == {}
    assert ledger_of(after.state)["zero"].bound == 0.0
    for site, basis in bases_of(state).items():
        assert torch.allclose(basis.left, bases_of(after.state)[site].left, atol=1e-6)


def test_identical_tasks_cost_no_new_directions() -> None:
    adapter = draw_adapters(LOOSE)["t0"]
    state, _ = fold_all({f"copy{n}": adapter for n in range(4)}, StreamPolicy())
    single, _ = fold_all({"copy0": adapter}, StreamPolicy())
    assert {s: b.k_out for s, b in bases_of(state).items()} == {s: b.k_out for s, b in bases_of(single).items()}
    assert all(dense_error(adapter, own) < 1e-5 for own in stored(state).values())


def test_a_new_update_replaces_a_task() -> None:
    adapters = draw_adapters(LOOSE)
    state, _ = fold_all(adapters, StreamPolicy())
    state = fold(state, "t0", adapters["t2"], StreamPolicy()).state
    assert sorted(state.tasks) == sorted(adapters)
    assert dense_error(adapters["t2"], stored(state)["t0"]) < 1e-5


def test_consuming_a_state_gives_what_copying_it_gives() -> None:
    adapters = draw_adapters(TIGHT)
    copied, _ = fold_all(adapters, policy_of(TIGHT))
    state = empty_stream(SITES)
    for task, adapter in adapters.items():
        state = fold(state, task, adapter, policy_of(TIGHT), consume=True).state
    for site, basis in bases_of(copied).items():
        assert torch.equal(basis.left, bases_of(state)[site].left)


def test_fold_leaves_its_input_alone() -> None:
    adapters = draw_adapters(TIGHT)
    _, folds = fold_all(adapters, policy_of(TIGHT))
    kept = {s: b.left.clone() for s, b in bases_of(folds[8].state).items()}
    fold(folds[8].state, "new", adapters["t0"], policy_of(TIGHT))
    assert all(torch.equal(kept[s], b.left) for s, b in bases_of(folds[8].state).items())


def test_a_published_space_continues_as_the_stream_it_came_from() -> None:
    adapters = draw_adapters(TIGHT)
    state, _ = fold_all(adapters, policy_of(TIGHT))
    again = stream_of(space_of(state), ledger_of(state))
    for task, adapter in stored(state).items():
        assert dense_error(adapter, stored(again)[task]) < 1e-6
    extra = draw_adapters(replace(TIGHT, seed=99))["t0"]
    one, two = (fold(s, "extra", extra, policy_of(TIGHT)).state for s in (state, again))
    mine, other = measured(one, {**adapters, "extra": extra}), measured(two, {**adapters, "extra": extra})
    assert all(abs(mine[task].bound - other[task].bound) < 0.05 for task in mine)


def test_refitting_wins_back_what_returned_and_never_loses() -> None:
    adapters = draw_adapters(TIGHT)
    state, _ = fold_all(adapters, policy_of(TIGHT))
    carried = measured(state, adapters)
    bases = bases_of(state)
    gains = []
    for task, adapter in adapters.items():
        fitted = Space(1, bases, {task: refitted(state, adapter)})
        error = dense_error(adapter, task_adapter(fitted, task, torch.float64))
        assert error <= carried[task].bound + 1e-6
        gains.append(carried[task].bound - error)
    assert max(gains) > 1e-3
