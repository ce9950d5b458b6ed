"""Types in, determinism, caps per site, pseudo-rank, and stacks that part and meet again."""

from __future__ import annotations

import pytest
import torch

from share_core.errors import ConfigError, NonFiniteError
from share_core.ledger import measure
from share_core.merge import MergePolicy, empty_state, merge
from share_core.space import advance, task_adapter
from share_core.streaming.fold import fold
from share_core.streaming.select import DENSE_EIGEN
from share_core.streaming.state import StreamPolicy, StreamState, empty_stream, seeded_stack
from share_core.streaming.view import bases_of, ledger_of, refitted, space_of, widened
from share_core.types import Adapter, Delta, Factors, SiteSpec, Space, SpaceSpec

SITES = {f"s{i}": SiteSpec(f"s{i}", 40, 30, "") for i in range(5)}


def adapters(count: int, rank: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Adapter]:
    g = torch.Generator().manual_seed(11)
    shared = {s: (torch.randn(40, 6, generator=g), torch.randn(30, 6, generator=g)) for s in SITES}
    made: dict[str, Adapter] = {}
    for n in range(count):
        made[f"t{n}"] = {
            s: Factors(
                (shared[s][0] @ torch.randn(6, rank, generator=g) + 0.3 * torch.randn(40, rank, generator=g)).to(dtype),
                (shared[s][1] @ torch.randn(6, rank, generator=g) + 0.3 * torch.randn(30, rank, generator=g)).to(dtype),
            )
            for s in SITES
        }
    return made


def folded(pool: dict[str, Adapter], policy: StreamPolicy) -> StreamState:
    state = empty_stream(SITES)
    for task, adapter in pool.items():
        state = fold(state, task, adapter, policy).state
    return state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_any_float_type_are_taken_at_their_own_precision(dtype: torch.dtype) -> None:
    pool = adapters(4, dtype=dtype)
    state = folded(pool, StreamPolicy())
    assert all(b.left.dtype == torch.float32 for b in bases_of(state).values())
    for task, adapter in pool.items():
        assert measure(adapter, task_adapter(space_of(state), task, torch.float64)).bound < 1e-5


def test_one_thread_gives_the_same_bits_again() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, two = (folded(adapters(9), StreamPolicy(k_max=8, window=2)) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    for site, basis in bases_of(one).items():
        assert torch.equal(basis.left, bases_of(two)[site].left)
        assert torch.equal(basis.right, bases_of(two)[site].right)


def test_single_sites_may_have_their_own_caps() -> None:
    policy = StreamPolicy(k_max=12, site_caps={"s1": (4, 7), "s3": (20, 20)}, window=2)
    state = folded(adapters(9), policy)
    sizes = {site: (b.k_out, b.k_in) for site, b in bases_of(state).items()}
    assert sizes == {"s0": (12, 12), "s1": (4, 7), "s2": (12, 12), "s3": (20, 20), "s4": (12, 12)}


def test_sites_that_grew_apart_meet_again_at_their_cap() -> None:
    pool = adapters(12)
    for n in range(3):  # the first tasks adapt different sites
        pool[f"t{n}"] = {site: f for i, (site, f) in enumerate(pool[f"t{n}"].items()) if (i + n) % 3}
    policy = StreamPolicy(k_max=10, window=2)
    state = empty_stream(SITES)
    counts = []
    for task, adapter in pool.items():
        state = fold(state, task, adapter, policy).state
        counts.append(len(state.stacks))
    assert max(counts) > 1
    assert counts[-1] == 1
    bounds = ledger_of(state)
    for task, adapter in pool.items():
        exact = measure(adapter, task_adapter(space_of(state), task, torch.float64))
        assert bounds[task].bound >= exact.bound
        assert exact.bound < 1.0


def test_a_pseudo_rank_cuts_cores_and_is_charged() -> None:
    pool = adapters(4)
    state = folded(pool, StreamPolicy(rank=1))
    space = space_of(state)
    assert {c.rank for own in space.cores.values() for c in own.values()} == {1}
    for task, adapter in pool.items():
        exact = measure(adapter, task_adapter(space, task, torch.float64)).bound
        assert 0.1 < exact <= ledger_of(state)[task].bound
        fitted = Space(1, space.bases, {task: refitted(state, adapter, rank=2)})
        assert measure(adapter, task_adapter(fitted, task)).bound < exact


def test_new_sites_join_a_running_stream() -> None:
    pool = adapters(9)
    first = {site: spec for site, spec in SITES.items() if site in ("s0", "s1")}
    state = empty_stream(first)
    policy = StreamPolicy(k_max=8, window=2)
    for n, (task, adapter) in enumerate(pool.items()):
        own = adapter if n > 4 else {site: f for site, f in adapter.items() if site in first}
        state = fold(widened(state, SITES if n > 4 else first), task, own, policy).state
        pool[task] = own
    assert len(state.stacks) == 1
    for task, adapter in pool.items():
        assert measure(adapter, task_adapter(space_of(state), task)).bound <= ledger_of(state)[task].bound + 1e-6


def test_streaming_ends_where_the_hubs_merge_ends() -> None:
    """The fast path against the slow one: float64, all tasks in every compaction, each charged singly."""
    pool = adapters(10)
    spec = SpaceSpec("sha256:test", "test", SITES)
    slow = empty_state(spec)
    for task, adapter in pool.items():
        slow = merge(slow, task, adapter, MergePolicy(k_max=9, tau=0.0, sweeps=3), pool).state
    state = folded(pool, StreamPolicy(k_max=9, window=3))
    fast, reference = 0.0, 0.0
    for task, adapter in pool.items():
        fitted = Space(1, bases_of(state), {task: refitted(state, adapter)})
        fast += measure(adapter, task_adapter(fitted, task)).bound
        reference += measure(adapter, task_adapter(slow.space, task)).bound
    assert fast < 1.03 * reference


@pytest.mark.parametrize("scale", [1e-14, 1e-9, 1e9, 1e17, 1e26])
def test_bounds_hold_at_any_size_that_float32_can_hold(scale: float) -> None:
    pool: dict[str, Adapter] = {
        task: {site: Factors(f.out * scale, f.in_) for site, f in adapter.items()}
        for task, adapter in adapters(9).items()
    }
    state = folded(pool, StreamPolicy(k_max=6, window=2))
    bounds = ledger_of(state)
    for task, adapter in pool.items():
        exact = measure(adapter, task_adapter(space_of(state), task, torch.float64)).bound
        assert 0 < exact <= bounds[task].bound < 10


def test_what_is_too_large_is_refused_and_what_is_too_small_is_said_to_be_lost() -> None:
    f = adapters(1)["t0"]["s0"]
    with pytest.raises(NonFiniteError, match="at most 1e"):
        fold(empty_stream(SITES), "huge", {"s0": Factors(f.out * 1e32, f.in_)}, StreamPolicy())
    state = fold(empty_stream(SITES), "tiny", {"s0": Factors(f.out * 1e-20, f.in_)}, StreamPolicy()).state
    assert bases_of(state)["s0"].k_out == 0
    assert ledger_of(state)["tiny"].bound == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, -1.0, float("inf"), float("nan")])
def test_a_share_that_weighs_nothing_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        fold(empty_stream(SITES), "t", adapters(1)["t0"], StreamPolicy(), share=share)


def test_a_larger_share_loses_less() -> None:
    pool = adapters(8)

    def error(share: float) -> float:
        state = empty_stream(SITES)
        for task, adapter in pool.items():
            own = share if task == "t2" else 1.0
            state = fold(state, task, adapter, StreamPolicy(k_max=8), share=own).state
        return measure(pool["t2"], task_adapter(space_of(state), "t2")).bound

    assert error(20.0) < 0.7 * error(1.0)


@pytest.mark.parametrize("cap", [9, 4])
@pytest.mark.parametrize("consume", [False, True])
def test_a_lowered_cap_shrinks_the_space_and_is_charged(cap: int, consume: bool) -> None:
    pool = adapters(12)
    state = folded(dict(list(pool.items())[:11]), StreamPolicy(k_max=16, window=2))
    before = bases_of(state)
    done = fold(state, "t11", pool["t11"], StreamPolicy(k_max=cap, window=2), consume=consume)
    assert {(b.k_out, b.k_in) for b in bases_of(done.state).values()} == {(cap, cap)}
    bounds = ledger_of(done.state)
    for task, adapter in pool.items():
        exact = measure(adapter, task_adapter(space_of(done.state), task, torch.float64)).bound
        assert exact <= bounds[task].bound
    stack = done.state.stacks[0]
    eye = torch.eye(cap)
    assert float((stack.left.mT @ stack.left - eye).abs().max()) < 1e-5
    if not consume:
        replayed = advance(Space(state.version, before, {}), Delta(state.version + 1, done.transition, {}))
        for site, basis in bases_of(done.state).items():
            assert torch.allclose(replayed.bases[site].left, basis.left, atol=1e-5)


def test_a_full_cold_start_of_many_directions_loses_nothing_while_tasks_fit() -> None:
    """Large bases choose by inverse iteration: directions that nobody uses must go first there too."""
    g = torch.Generator().manual_seed(0)
    k = 128
    assert k > DENSE_EIGEN
    left, right = (torch.linalg.qr(torch.randn(2, d, k, generator=g)).Q for d in (300, 280))
    state = StreamState((seeded_stack(["a", "b"], left, right),), ())
    pool: dict[str, Adapter] = {}
    for n in range(k // 8):
        pool[f"t{n}"] = {
            s: Factors(torch.randn(300, 8, generator=g) * 10.0 ** -(n % 3), torch.randn(280, 8, generator=g))
            for s in ("a", "b")
        }
        state = fold(state, f"t{n}", pool[f"t{n}"], StreamPolicy(k_max=k)).state
    space = space_of(state)
    assert max(measure(a, task_adapter(space, t, torch.float64)).bound for t, a in pool.items()) < 1e-5
