"""Every fast path of streaming against the obvious slow one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_core.errors import ConfigError
from share_core.linalg import canonical
from share_core.streaming import select
from share_core.streaming.chunks import current_bounds, follow, grams, settle, up_to_date, without
from share_core.streaming.project import ROUNDING, canonical_stack, residual_side, slabs
from share_core.streaming.reflect import Reflector, reflect_basis, reflect_gram, reflect_rows, reflector
from share_core.streaming.select import Cores, choose_dropped, weakest
from share_core.streaming.state import StreamPolicy, TaskChunk, seeded_stack

SHAPES = st.tuples(st.integers(2, 12), st.integers(1, 5), st.integers(0, 2**31))


def orthonormal(s: int, d: int, k: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(s, d, k, generator=g, dtype=torch.float64)).Q
    return q


@given(SHAPES)
@settings(max_examples=30, deadline=None)
def test_reflector_keeps_an_orthonormal_basis_of_what_is_not_dropped(shape: tuple[int, int, int]) -> None:
    keep, m, seed = shape
    dropped = orthonormal(3, keep + m, m, seed)
    by = reflector(dropped)
    p = by.dense()
    assert torch.allclose(p.mT @ p, torch.eye(keep, dtype=torch.float64).expand(3, keep, keep), atol=1e-12)
    assert float((dropped.mT @ p).abs().max()) < 1e-12


@given(SHAPES)
@settings(max_examples=20, deadline=None)
def test_reflecting_equals_the_dense_rotation(shape: tuple[int, int, int]) -> None:
    keep, m, seed = shape
    by = reflector(orthonormal(2, keep + m, m, seed))
    p = by.dense()
    g = torch.Generator().manual_seed(seed)
    base, extra = (torch.randn(2, 20, n, generator=g) for n in (keep, m))
    expected = torch.cat([base, extra], dim=-1).double() @ p
    assert torch.allclose(reflect_basis(base.clone(), extra, by).double(), expected, atol=1e-4)
    rows = torch.randn(2, keep + m, 5, generator=g, dtype=torch.float64)
    assert torch.allclose(reflect_rows(rows, by), p.mT @ rows, atol=1e-10)
    for known in (keep, max(1, keep - 2)):
        half = torch.randn(2, known, known, generator=g, dtype=torch.float64)
        gram = half @ half.mT
        padded = torch.nn.functional.pad(gram, (0, keep + m - known, 0, keep + m - known))
        assert torch.allclose(reflect_gram(gram, by), p.mT @ padded @ p, atol=1e-10)


def test_dropping_the_newcomers_leaves_the_old_directions_where_they_are() -> None:
    dropped = torch.eye(9, dtype=torch.float64)[:, 6:].unsqueeze(0)
    assert torch.equal(reflector(dropped).dense()[0], torch.eye(9, 6, dtype=torch.float64))


@given(st.integers(0, 2**31), st.integers(1, 20))
@example(195, 1)  # two energies so close that one column alone takes the wrong direction
@settings(max_examples=10, deadline=None)
def test_inverse_iteration_loses_no_more_than_the_eigendecomposition(seed: int, count: int) -> None:
    g = torch.Generator().manual_seed(seed)
    k = select.DENSE_EIGEN + 30
    spectrum = 10 ** (-3 * torch.rand(2, k, generator=g, dtype=torch.float64))
    basis = orthonormal(2, k, k, seed)
    gram = basis * spectrum.unsqueeze(-2) @ basis.mT
    found = weakest(gram, count)
    assert torch.allclose(found.mT @ found, torch.eye(count, dtype=torch.float64).expand(2, -1, -1), atol=1e-10)
    best = torch.linalg.eigvalsh(gram)[:, :count].sum(-1)
    lost = ((gram @ found) * found).sum((-2, -1))
    assert bool((lost <= best * 1.25 + 1e-6 * spectrum.amax()).all()), (lost, best)


def test_a_gram_without_energy_falls_back_and_drops_what_nobody_uses() -> None:
    k = select.DENSE_EIGEN + 10
    gram = torch.zeros(1, k, k, dtype=torch.float64)
    gram[0, :5, :5] = torch.eye(5, dtype=torch.float64)
    found = weakest(gram, 4)
    assert float(((gram @ found) * found).sum()) < 1e-9
    nothing = weakest(torch.zeros(1, k, k, dtype=torch.float64), 4)
    assert torch.isfinite(nothing).all()


def test_with_every_task_in_the_window_the_choice_is_hooi() -> None:
    g = torch.Generator().manual_seed(3)
    out, in_ = (torch.randn(1, 7, 12, 2, generator=g) * 0.7 ** torch.arange(12).unsqueeze(-1) for _ in range(2))
    none = torch.zeros(1, 12, 12, dtype=torch.float64)
    left, right = choose_dropped(none, none, Cores(out, in_), (6, 6), sweeps=30)
    assert left is not None and right is not None
    cores = [(out[0, t].double() @ in_[0, t].double().T) for t in range(7)]
    p_in = torch.linalg.eigh(sum(c.T @ c for c in cores)).eigenvectors[:, -6:]
    for _ in range(30):
        p_out = torch.linalg.eigh(sum(c @ p_in @ p_in.T @ c.T for c in cores)).eigenvectors[:, -6:]
        p_in = torch.linalg.eigh(sum(c.T @ p_out @ p_out.T @ c for c in cores)).eigenvectors[:, -6:]
    best = sum(float((p_out.T @ c @ p_in).square().sum()) for c in cores)
    keep_l, keep_r = reflector(left).dense()[0], reflector(right).dense()[0]
    found = sum(float((keep_l.T @ c @ keep_r).square().sum()) for c in cores)
    assert found > best * (1 - 1e-4)


@given(st.integers(1, 6), st.integers(0, 2**31), st.floats(-8, 8))
@settings(max_examples=30, deadline=None)
def test_canonical_stack_equals_the_decomposition_by_qr(rank: int, seed: int, exponent: float) -> None:
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 17, rank, generator=g) * 10.0**exponent
    in_ = torch.randn(2, 11, rank, generator=g)
    form = canonical_stack(out, in_)
    _, s, _ = canonical(out, in_)
    assert torch.allclose(form.s, s, rtol=1e-4, atol=1e-5 * float(s.max()))
    again = (form.u.double() * form.s.unsqueeze(-2)) @ form.v.double().mT
    assert float((again - out.double() @ in_.double().mT).norm()) < 1e-5 * float(s.norm())


@given(st.integers(0, 8), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_residual_directions_are_orthonormal_and_complete(k: int, rank: int, seed: int) -> None:
    basis = orthonormal(2, 20, k, seed).float()
    g = torch.Generator().manual_seed(seed)
    # One direction hangs a hair's breadth out of the basis: the hard case for a single projection.
    factor = torch.randn(2, 20, rank, generator=g)
    if k:
        factor[..., 0] = basis[..., 0] + 1e-4 * factor[..., 0]
    form = canonical_stack(factor, torch.randn(2, 9, rank, generator=g))
    side = residual_side(basis, form.u, torch.diag_embed(form.s))
    whole = torch.cat([basis, side.directions], dim=-1).double()
    alive = int((side.strengths > 0).sum(-1).min())
    used = whole[..., : k + alive]
    gram = used.mT @ used
    assert float((gram - torch.eye(k + alive, dtype=torch.float64)).abs().max()) < 2e-6
    rows = torch.cat([side.inside, side.outside], dim=-2)
    x = form.u.double() * form.s.unsqueeze(-2)
    again = whole @ (rows * form.s.unsqueeze(-2))
    assert float((x - again).norm()) <= 2e-5 * float(x.norm())


def test_slabs_cover_every_site_once() -> None:
    site = 3 * 2 * 4
    with mock.patch("share_core.streaming.project.SLAB_BYTES", 4 * site):
        found = slabs(torch.zeros(10, 3, 2))
    assert [len(range(*s.indices(10))) for s in found] == [4, 4, 2]
    assert [i for s in found for i in range(*s.indices(10))] == list(range(10))
    with mock.patch("share_core.streaming.project.SLAB_BYTES", site // 2):
        assert len(slabs(torch.zeros(10, 3, 2))) == 10  # never less than one site
    assert slabs(torch.empty(0, 1, 1)) == []
    assert slabs(torch.empty(10, 4096, 256, device="meta")) == [slice(0, 10)]  # not a CPU: everything at once


def chunk(n: int, k: int, seed: int = 0) -> TaskChunk:
    g = torch.Generator().manual_seed(seed)
    real = torch.float64
    return TaskChunk(
        tasks=tuple(f"c{seed}-{i}" for i in range(n)),
        out=torch.randn(2, n, k, 3, generator=g),
        in_=torch.randn(2, n, k, 3, generator=g),
        weights=torch.rand(n, generator=g, dtype=real) + 0.1,
        norms=torch.ones(2, n, dtype=real),
        bounds=torch.zeros(2, n, dtype=real),
        measured=torch.ones(n, dtype=torch.bool),
    )


def test_maps_of_a_settled_chunk_compose_like_dense_rotations() -> None:
    start = chunk(4, 8)
    now, dense_out, dense_in = start, start.out.double(), start.in_.double()
    for step in range(3):
        left, right = reflector(orthonormal(2, 10, 2, 50 + step)), reflector(orthonormal(2, 9, 1, 70 + step))
        now = replace(follow(now, left, right, consume=False), cuts=now.cuts + 1)
        dense_out = _moved(dense_out, 10, left)
        dense_in = _moved(dense_in, 9, right)
    got = up_to_date(now, (8, 8))
    assert torch.allclose(got.out.double(), dense_out, atol=1e-5)
    assert torch.allclose(got.in_.double(), dense_in, atol=1e-5)
    assert got.cuts == 0 and not bool(got.measured.any())
    lost = _products(start.out.double(), start.in_.double()) - _products(dense_out, dense_in)
    assert bool((got.bounds >= lost.clamp_min(0).sqrt()).all())
    waiting = current_bounds(replace(now, pending=torch.tensor([0.5, 2.0], dtype=torch.float64)))
    expected = torch.tensor([[0.5], [2.0]], dtype=torch.float64) / now.weights.sqrt() + 3 * ROUNDING
    assert torch.allclose(waiting, expected)


def _moved(rows: Tensor, k: int, by: Reflector) -> Tensor:
    padded = torch.nn.functional.pad(rows, (0, 0, 0, k - rows.shape[-2]))
    return by.dense().mT.unsqueeze(1) @ padded


def _products(out: Tensor, in_: Tensor) -> Tensor:
    return (out @ in_.mT).square().sum((-2, -1))


def test_settled_tasks_are_in_the_grams_and_leave_with_their_task() -> None:
    window = 3
    stack = seeded_stack(["a", "b"], orthonormal(2, 20, 5, 0).float(), orthonormal(2, 20, 5, 1).float())
    for number in range(40):
        one = chunk(1, 5, number)
        stack = replace(stack, recent=one if not stack.recent.count else _with(stack.recent, one))
        stack = settle(stack, window)
        sizes = [c.count for c in stack.settled]
        assert all(a >= 4 * b for a, b in itertools.pairwise(sizes)), sizes
    assert sum(c.count for c in stack.chunks) == 40
    assert stack.recent.count < 2 * window
    expected = sum((grams(c)[0] for c in stack.settled), torch.zeros(2, 5, 5, dtype=torch.float64))
    assert torch.allclose(stack.gram_left, expected, atol=1e-8)
    rest = without(stack, frozenset({"c3-0", "c39-0"}))
    assert sum(c.count for c in rest.chunks) == 38
    gone = next(c for c in stack.settled if "c3-0" in c.tasks)
    index = gone.tasks.index("c3-0")
    out, in_ = gone.out[:, index].double(), gone.in_[:, index].double()
    own = gone.weights[index] * out @ (in_.mT @ in_) @ out.mT
    assert torch.allclose(rest.gram_left, stack.gram_left - own, atol=1e-6)


def _with(a: TaskChunk, b: TaskChunk) -> TaskChunk:
    from share_core.streaming.chunks import joined

    return joined(a, b)


@pytest.mark.parametrize(
    "values", [{"k_max": 0}, {"tau": 1.0}, {"tau": -0.1}, {"window": 0}, {"sweeps": -1}, {"rank": 0}]
)
def test_a_policy_that_cannot_work_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        StreamPolicy(**values)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        StreamPolicy(site_caps={"a": (0, 3)})
