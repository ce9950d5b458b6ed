"""The properties of MATH section 4 (1 to 7 and 9), each with planted bugs it must catch.

A property is a plain function of a drawn case that asserts. One test runs it over many cases; another runs it once
with each planted bug and demands that it fails. Products are compared, never factors.

Planted bugs: canonical form that ignores the gauge (skips one QR), append that keeps one direction too few, append
without the second projection, compaction that throws away the strongest directions, compaction without task weights
on wildly different norms, a ledger that is not charged, a ledger that measures against itself, padding on the wrong
end, cores averaged factor by factor, a rotation applied twice, and a merge that scales cores up.
"""

from __future__ import annotations

import contextlib
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
import share_core.compaction
import share_core.ledger
import share_core.linalg
import share_core.merge
import share_core.space
from share_core.errors import TensorShapeError
from share_core.linalg import difference_norm, float64
from share_core.merge import HubState, MergePolicy, empty_state, merge, recompute_ledger
from share_core.space import advance, empty_space, lift_cores, mean_cores, task_adapter, update_adapter
from share_core.types import (
    Adapter,
    Core,
    Cores,
    Delta,
    Factors,
    SiteBasis,
    SiteSpec,
    SiteTransition,
    SiteUpdate,
    SpaceSpec,
    Update,
)


@dataclass(frozen=True)
class Case:
    """Shapes, ranks and scales of a sequence of adapters, and the seed that fills them."""

    tasks: int
    rank: int
    scale_exponent: int
    seed: int
    k_max: int = 64


CASES = st.builds(
    Case,
    tasks=st.integers(2, 7),
    rank=st.integers(1, 5),
    scale_exponent=st.integers(-6, 6),
    seed=st.integers(0, 2**31),
)
TIGHT_CASES = st.builds(
    Case,
    tasks=st.integers(5, 9),
    rank=st.integers(2, 4),
    scale_exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
    k_max=st.integers(5, 9),
)
SITES = {
    "a.query": SiteSpec("a.query", 24, 18, "0" * 64),
    "b.query": SiteSpec("b.query", 24, 18, "0" * 64),
    "a.value": SiteSpec("a.value", 14, 30, "0" * 64),
}
SPEC = SpaceSpec("sha256:test", "test", SITES)


def draw_adapters(case: Case) -> dict[str, Adapter]:
    """Return adapters of unequal ranks, norms over two decades and decaying spectra, some with a missing site."""
    g = torch.Generator().manual_seed(case.seed)
    adapters: dict[str, Adapter] = {}
    for task in range(case.tasks):
        own: dict[str, Factors] = {}
        for number, site in enumerate(SITES.values()):
            rank = max(1, case.rank - (task + number) % 2)
            decay = 0.6 ** torch.arange(rank, dtype=torch.float64)
            scale = 10.0 ** (case.scale_exponent + task % 3 - 1)
            out = torch.randn(site.d_out, rank, generator=g, dtype=torch.float64) * decay * scale
            own[site.name] = Factors(out.float(), torch.randn(site.d_in, rank, generator=g))
        if task == 1:
            del own["b.query"]
        adapters[f"org/t{task}"] = own
    return adapters


def merge_all(
    adapters: Mapping[str, Adapter], policy: MergePolicy, with_originals: bool = False
) -> tuple[HubState, list[Delta], list[HubState]]:
    state, deltas, states = empty_state(SPEC), [], []
    for task, adapter in adapters.items():
        merged = merge(state, task, adapter, policy, adapters if with_originals else None)
        state = merged.state
        deltas.append(merged.delta)
        states.append(state)
    return state, deltas, states


def dense(factors: Factors | None, site: SiteSpec) -> Tensor:
    """The obvious slow way: the whole matrix in float64."""
    if factors is None:
        return torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
    return float64(factors.out) @ float64(factors.in_).T


def dense_error(original: Adapter, stored: Adapter) -> float:
    """Relative error over all sites, computed on whole matrices."""
    lost = sum(float((dense(original.get(n), s) - dense(stored.get(n), s)).norm()) ** 2 for n, s in SITES.items())
    norm = sum(float(dense(original.get(n), s).norm()) ** 2 for n, s in SITES.items())
    return math.sqrt(lost / norm)


# --- the properties ----------------------------------------------------------------------------------------------


def gauge(case: Case) -> None:
    """1: merging (B G, A.T G^-T) gives the same dW as merging (B, A.T)."""
    adapters = draw_adapters(case)
    g = torch.Generator().manual_seed(case.seed + 1)
    turned: dict[str, Adapter] = {}
    for task, own in adapters.items():
        turned[task] = {}
        for site, f in own.items():
            gauge_matrix = torch.randn(f.rank, f.rank, generator=g, dtype=torch.float64)
            gauge_matrix = gauge_matrix + 3 * torch.eye(f.rank, dtype=torch.float64)
            out, in_ = float64(f.out) @ gauge_matrix, float64(f.in_) @ torch.linalg.inv(gauge_matrix).T
            turned[task] = {**turned[task], site: Factors(out, in_)}
    policy = MergePolicy(k_max=case.rank * 2 + 1, tau=0.2)
    plain, _, _ = merge_all(adapters, policy)
    other, _, _ = merge_all(turned, policy)
    for task in adapters:
        a, b = task_adapter(plain.space, task), task_adapter(other.space, task)
        assert dense_error(a, b) < 1e-4


def lossless(case: Case) -> None:
    """2: while k fits, every task reconstructs to rounding error, and old tasks do not move at all."""
    adapters = draw_adapters(case)
    state, _, states = merge_all(adapters, MergePolicy(k_max=64, tau=0.0))
    for task, adapter in adapters.items():
        assert dense_error(adapter, task_adapter(state.space, task)) < 2e-6
        first = next(s for s in states if task in s.space.cores)
        for site, core in first.space.cores[task].items():
            now = state.space.cores[task][site]
            assert torch.equal(now.out[: core.out.shape[0]], core.out)
            assert not now.out[core.out.shape[0] :].any()
    for site, basis in state.space.bases.items():
        for side in (basis.left, basis.right):
            gram = float64(side).T @ float64(side)
            assert float((gram - torch.eye(side.shape[1])).abs().max()) < 1e-5, site


def order(case: Case) -> None:
    """3: any arrival order ends within 5 % of the error of an oracle that sees all adapters at once.

    Of 7,500 such pools drawn at random 4 missed it, the worst at 5.8 %: what a compaction dropped before later tasks
    asked for it is not won back by more sweeps.
    """
    adapters = {task: {"a.query": own["a.query"]} for task, own in draw_adapters(case).items()}
    policy = MergePolicy(k_max=case.k_max, tau=0.0)
    best = oracle_error([dense(own["a.query"], SITES["a.query"]) for own in adapters.values()], case.k_max)
    for arrival in (list(adapters), list(reversed(adapters))):
        state, _, _ = merge_all({task: adapters[task] for task in arrival}, policy, with_originals=True)
        errors = [dense_error(adapters[task], task_adapter(state.space, task)) for task in adapters]
        ours = math.sqrt(sum(e * e for e in errors) / len(errors))
        assert ours <= 1.05 * best + 1e-5


def oracle_error(matrices: list[Tensor], k: int) -> float:
    """Root mean square relative error of the best pair of bases found by 50 HOOI sweeps over all matrices."""
    unit = [m / m.norm() for m in matrices]
    right = torch.linalg.eigh(sum((m.T @ m for m in unit), torch.zeros(()))).eigenvectors[:, -k:]
    for _ in range(50):
        left = torch.linalg.eigh(sum(((m @ right) @ (m @ right).T for m in unit), torch.zeros(()))).eigenvectors[:, -k:]
        right = torch.linalg.eigh(sum(((left.T @ m).T @ (left.T @ m) for m in unit), torch.zeros(()))).eigenvectors[
            :, -k:
        ]
    lost = [float((m - left @ (left.T @ m @ right) @ right.T).norm()) ** 2 for m in unit]
    return math.sqrt(sum(lost) / len(lost))


def ledger(case: Case) -> None:
    """4: the bound is never below the measured error, and a recomputed ledger equals it to 1e-6 relative."""
    adapters = draw_adapters(case)
    state, _, states = merge_all(adapters, MergePolicy(k_max=case.k_max, tau=0.02))
    for snapshot in states:
        for task in snapshot.space.cores:
            measured = dense_error(adapters[task], task_adapter(snapshot.space, task, torch.float64))
            assert snapshot.ledger[task].bound >= measured * (1 - 1e-6) - 1e-12
            if snapshot.ledger[task].measured:
                assert snapshot.ledger[task].bound == pytest.approx(measured, rel=1e-6, abs=1e-9)
    for task, adapter in adapters.items():
        again = recompute_ledger(state, task, adapter).ledger[task]
        assert again.measured
        assert again.bound == pytest.approx(
            dense_error(adapter, task_adapter(state.space, task, torch.float64)), rel=1e-6, abs=1e-9
        )


def budget(case: Case) -> None:
    """2b: with a budget tau and room to grow, no task loses more than tau."""
    adapters = draw_adapters(case)
    for tau in (0.05, 0.3):
        state, _, _ = merge_all(adapters, MergePolicy(k_max=64, tau=tau))
        for task, adapter in adapters.items():
            assert dense_error(adapter, task_adapter(state.space, task)) <= tau + 1e-6


def replay(case: Case) -> None:
    """5: replaying all transitions gives the current bases; lifted coefficients equal those computed directly."""
    adapters = draw_adapters(case)
    for k_max in (64, case.rank * 2):
        state, deltas, states = merge_all(adapters, MergePolicy(k_max=k_max, tau=0.01))
        space = empty_space(SPEC)
        for delta in deltas:
            space = advance(space, delta)
        assert space.version == state.space.version == len(deltas)
        for site, basis in state.space.bases.items():
            assert torch.equal(space.bases[site].left, basis.left)
            assert torch.equal(space.bases[site].right, basis.right)
        if any(delta.compacts for delta in deltas):
            continue
        first, task = states[0], next(iter(adapters))
        lifted = lift_cores(first.space.cores[task], [delta.transition for delta in deltas[1:]])
        for site, core in lifted.items():
            basis, old = state.space.bases[site], task_adapter(first.space, task)[site]
            direct = Core(basis.left.T @ old.out, basis.right.T @ old.in_)
            scale = float(share_core.linalg.product_norm(core.out, core.in_))
            assert float(difference_norm(core.out, core.in_, direct.out, direct.in_)) <= 1e-5 * scale
            assert torch.equal(core.out, state.space.cores[task][site].out)


def averaging(case: Case) -> None:
    """6: averaging cores of n clients equals averaging their dW (in-span part)."""
    adapters = draw_adapters(case)
    state, _, _ = merge_all(adapters, MergePolicy(k_max=64, tau=0.0))
    weights = [1.0 + i for i in range(len(adapters))]
    weights = [w / sum(weights) for w in weights]
    mean = mean_cores(list(state.space.cores.values()), rank=64, weights=weights)
    for name, site in SITES.items():
        basis = state.space.bases[name]
        expected = sum(
            (w * dense(task_adapter(state.space, t).get(name), site) for w, t in zip(weights, adapters, strict=True)),
            torch.zeros(site.d_out, site.d_in, dtype=torch.float64),
        )
        core = mean[name]
        got = float64(basis.left) @ float64(core.out) @ float64(core.in_).T @ float64(basis.right).T
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


def contraction(case: Case) -> None:
    """7: no merge enlarges a task's norm."""
    adapters = draw_adapters(case)
    _, _, states = merge_all(adapters, MergePolicy(k_max=case.k_max, tau=0.05))
    before: dict[str, float] = {}
    for state in states:
        for task in state.space.cores:
            stored = task_adapter(state.space, task)
            norm = math.sqrt(sum(float(dense(stored.get(n), s).norm()) ** 2 for n, s in SITES.items()))
            limit = before.get(task, state.ledger[task].norm)
            assert norm <= limit * (1 + 1e-5)
            before[task] = norm


def fairness(case: Case) -> None:
    """2c: in a compaction a task counts by its relative error, not by its size."""
    adapters = dict(list(draw_adapters(replace(case, tasks=4, scale_exponent=0)).items()))
    loud = {site: Factors(f.out * 1e4, f.in_) for site, f in adapters["org/t0"].items()}
    state, _, _ = merge_all({**adapters, "org/t0": loud}, MergePolicy(k_max=2 * case.rank, tau=0.0))
    plain, _, _ = merge_all(adapters, MergePolicy(k_max=2 * case.rank, tau=0.0))
    for task in ("org/t1", "org/t2", "org/t3"):
        mine = dense_error(adapters[task], task_adapter(state.space, task))
        assert mine == pytest.approx(dense_error(adapters[task], task_adapter(plain.space, task)), abs=1e-3)


PROPERTIES: dict[Callable[[Case], None], st.SearchStrategy[Case]] = {
    gauge: CASES,
    lossless: CASES,
    budget: CASES,
    fairness: CASES,
    order: TIGHT_CASES,
    ledger: TIGHT_CASES,
    replay: CASES,
    averaging: CASES,
    contraction: TIGHT_CASES,
}


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_property(check: Callable[[Case], None]) -> None:
    @settings(max_examples=12, deadline=None)
    @given(PROPERTIES[check])
    def run(case: Case) -> None:
        check(case)

    run()


# --- planted bugs ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted(where: str, bug: Any) -> Iterator[None]:
    with mock.patch(where, bug):
        yield


def _canonical_without_qr(out: Tensor, in_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = out.norm(dim=-2) * in_.norm(dim=-2)
    return float64(out / out.norm(dim=-2, keepdim=True)), float64(s), float64(in_ / in_.norm(dim=-2, keepdim=True))


def _choose_one_too_few(strengths: Any, budget2: float) -> tuple[dict[str, int], float]:
    counts, spent = REAL_CHOOSE(strengths, budget2)
    return {site: max(0, count - 1) for site, count in counts.items()}, spent


def _choose_spending_double(strengths: Any, budget2: float) -> tuple[dict[str, int], float]:
    return REAL_CHOOSE(strengths, budget2 * 6)


def _weakest_eigenvectors(gram: Tensor, count: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors
    return vectors[..., :count]


def _charge_nothing(own: Any, losses: Any) -> Any:
    return replace(own, measured=False)


def _measure_nothing(original: Adapter, stored: Adapter) -> Any:
    return REAL_MEASURE(original, original)


def _pad_in_front(factor: Tensor, appended: int, rotate: Tensor | None) -> Tensor:
    grown = torch.cat([factor.new_zeros(appended, factor.shape[1]), factor])
    return grown if rotate is None else (rotate.T @ grown).to(factor.dtype)


def _average_factors(cores: list[Cores], rank: int, weights: list[float] | None = None) -> Cores:
    assert weights is not None
    mean = {}
    for site in SITES:
        parts = [(own[site], w) for own, w in zip(cores, weights, strict=True) if site in own]
        width = max(core.rank for core, _ in parts)
        out = sum(torch.nn.functional.pad(c.out, (0, width - c.rank)) * w for c, w in parts)
        in_ = sum(torch.nn.functional.pad(c.in_, (0, width - c.rank)) * w for c, w in parts)
        assert isinstance(out, Tensor)
        assert isinstance(in_, Tensor)
        mean[site] = Core(out, in_)
    return mean


def _carry_twice(what: str, old: Tensor, append: Tensor, rotate: Tensor | None) -> Tensor:
    first = REAL_CARRY_SIDE(what, old, append, rotate)
    return first if rotate is None else first * 1.5


def _compress_louder(out: Tensor, in_: Tensor, rank: int) -> Core | None:
    core = REAL_COMPRESS(out, in_, rank)
    return None if core is None else Core(core.out * 1.02, core.in_)


REAL_CHOOSE = share_core.append.choose_directions
REAL_MEASURE = share_core.ledger.measure
REAL_CARRY_SIDE = share_core.space._carry_side
REAL_COMPRESS = share_core.space.compress_core

LOOSE = Case(tasks=4, rank=3, scale_exponent=0, seed=7)
TIGHT = Case(tasks=7, rank=3, scale_exponent=0, seed=7, k_max=6)


@pytest.mark.parametrize(
    ("check", "case", "where", "bug"),
    [
        (gauge, LOOSE, "share_core.append.canonical", _canonical_without_qr),
        (lossless, LOOSE, "share_core.append.choose_directions", _choose_one_too_few),
        (lossless, LOOSE, "share_core.append.residual", lambda basis, x: x),
        (budget, LOOSE, "share_core.append.choose_directions", _choose_spending_double),
        (fairness, LOOSE, "share_core.merge.task_weight", lambda norm: 1.0),
        (order, TIGHT, "share_core.compaction.top_eigenvectors", _weakest_eigenvectors),
        (ledger, TIGHT, "share_core.merge.charge", _charge_nothing),
        (ledger, TIGHT, "share_core.merge.measure", _measure_nothing),
        (replay, LOOSE, "share_core.space._carry_factor", _pad_in_front),
        (averaging, LOOSE, f"{__name__}.mean_cores", _average_factors),
        (contraction, TIGHT, "share_core.space._carry_side", _carry_twice),
        (contraction, TIGHT, "share_core.append.compress_core", _compress_louder),
    ],
    ids=lambda value: value.__name__ if callable(value) else (value if isinstance(value, str) else None),
)
def test_property_catches_planted_bug(check: Callable[[Case], None], case: Case, where: str, bug: Any) -> None:
    check(case)
    module, _, name = where.rpartition(".")
    target = globals() if module == __name__ else None
    context = mock.patch.dict(target, {name: bug}) if target is not None else planted(where, bug)
    with context, pytest.raises(Exception):  # noqa: B017 - any failure counts as caught
        check(case)


# --- 9: edges of drawn adapters; those of single ones are in test_merge_edges.py ----------------------------------


def test_a_zero_task_survives_the_compaction_of_others() -> None:
    case = TIGHT
    adapters = {"org/zero": {"a.query": Factors(torch.zeros(24, 2), torch.zeros(18, 2))}, **draw_adapters(case)}
    state, deltas, _ = merge_all(adapters, MergePolicy(k_max=case.k_max, tau=0.0))
    assert any(delta.compacts for delta in deltas)
    assert state.ledger["org/zero"].bound == 0.0


def test_identical_tasks_cost_no_new_directions() -> None:
    adapter = draw_adapters(LOOSE)["org/t0"]
    state = empty_state(SPEC)
    sizes = []
    for number in range(4):
        state = merge(state, f"org/copy{number}", adapter, MergePolicy(tau=0.0)).state
        sizes.append({site: (b.k_out, b.k_in) for site, b in state.space.bases.items()})
    assert all(size == sizes[0] for size in sizes)
    for number in range(4):
        assert dense_error(adapter, task_adapter(state.space, f"org/copy{number}")) < 2e-6


def test_a_new_update_of_a_task_replaces_its_content() -> None:
    adapters = draw_adapters(LOOSE)
    state, _, _ = merge_all(adapters, MergePolicy(tau=0.0))
    changed = adapters["org/t3"]
    state = merge(state, "org/t0", changed, MergePolicy(tau=0.0)).state
    assert dense_error(changed, task_adapter(state.space, "org/t0")) < 2e-6
    assert len(state.space.cores) == LOOSE.tasks


def test_merge_leaves_its_input_alone() -> None:
    adapters = draw_adapters(TIGHT)
    state, _, states = merge_all(adapters, MergePolicy(k_max=TIGHT.k_max, tau=0.0))
    kept = states[2].space.bases["a.query"].left.clone()
    merge(states[2], "org/new", adapters["org/t0"], MergePolicy(k_max=TIGHT.k_max))
    assert torch.equal(kept, states[2].space.bases["a.query"].left)
    assert state.space.version == TIGHT.tasks


def test_ambient_lift_of_an_update_equals_core_plus_residual() -> None:
    adapters = draw_adapters(LOOSE)
    state, _, _ = merge_all(adapters, MergePolicy(tau=0.0))
    basis = state.space.bases["a.query"]
    core = Core(torch.randn(basis.k_out, 2), torch.randn(basis.k_in, 2))
    residual = Factors(torch.randn(24, 3), torch.randn(18, 3))
    update = Update(state.space.version, {"a.query": SiteUpdate(core, residual)})
    got = dense(update_adapter(update, state.space.bases)["a.query"], SITES["a.query"])
    expected = float64(basis.left) @ float64(core.out) @ float64(core.in_).T @ float64(basis.right).T
    assert float((got - expected - dense(residual, SITES["a.query"])).norm()) < 1e-9 * float(got.norm())
    wrong = Update(0, {"a.query": SiteUpdate(Core(core.out[:-1], core.in_))})
    with pytest.raises(TensorShapeError, match=f"expected {basis.k_out} x {basis.k_in}"):
        update_adapter(wrong, state.space.bases)


def test_rotation_with_a_non_orthonormal_matrix_keeps_products() -> None:
    """P may be any full-rank matrix; coefficients follow by its left inverse."""
    adapters = draw_adapters(LOOSE)
    state, _, _ = merge_all(adapters, MergePolicy(tau=0.0))
    basis = state.space.bases["a.query"]
    g = torch.Generator().manual_seed(1)
    rotate = torch.eye(basis.k_out) + 0.1 * torch.randn(basis.k_out, basis.k_out, generator=g)
    empty = SiteTransition(basis.left[:, :0], basis.right[:, :0], rotate_left=rotate)
    space = advance(state.space, Delta(state.space.version + 1, {"a.query": empty}, {}))
    for task in adapters:
        a, b = task_adapter(state.space, task), task_adapter(space, task)
        assert dense_error(a, b) < 1e-5
    assert isinstance(space.bases["a.query"], SiteBasis)
