"""The published merge against a slow dense version, and its known faults, each measured (MATH section 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from share_core.types import Adapter, Factors
from share_simulations.baselines.oracle import oracle
from share_simulations.baselines.paper import (
    PaperState,
    paper_absorb,
    paper_numbers,
    paper_once,
    paper_reconstruct,
    paper_stream,
)
from share_simulations.baselines.types import Compressed, errors

Pool = Callable[..., dict[str, Adapter]]
Dense = Callable[[Factors], Tensor]


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def slow_projector(columns: list[Tensor], k: int, centred: bool) -> Tensor:
    """The projector on the top k directions, from the dense covariance (d, d)."""
    stack = torch.cat([c.double() for c in columns], dim=1)
    if centred:
        stack = stack - stack.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(stack @ stack.mT)
    top = vectors[:, values > 1e-12 * values[-1]][:, -k:]
    projector: Tensor = top @ top.mT
    return projector


def slow_stream(adapters: Mapping[str, Adapter], site: str, k: int, centred: bool) -> dict[str, Tensor]:
    """The sequential merge of one site with full matrices throughout."""
    out: dict[str, Tensor] = {}
    in_: dict[str, Tensor] = {}
    for task, adapter in adapters.items():
        out[task], in_[task] = adapter[site].out.double(), adapter[site].in_.double()
        left = slow_projector(list(out.values()), k, centred)
        right = slow_projector(list(in_.values()), k, centred)
        out, in_ = {t: left @ x for t, x in out.items()}, {t: right @ x for t, x in in_.items()}
    return {task: out[task] @ in_[task].mT for task in adapters}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_once_matches_dense_projectors(pool: Pool, dense: Dense, k: int, centred: bool) -> None:
    adapters = pool(0, (2, 1, 3))
    stored = paper_once(adapters, k, centred).stored
    for site in adapters["task0"]:
        left = slow_projector([a[site].out for a in adapters.values()], k, centred)
        right = slow_projector([a[site].in_ for a in adapters.values()], k, centred)
        for task, adapter in adapters.items():
            expected = left @ dense(adapter[site]) @ right
            assert torch.allclose(dense(stored[task][site]), expected, atol=1e-10), (task, site)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_stream_matches_dense_projectors(pool: Pool, dense: Dense, k: int, centred: bool) -> None:
    adapters = pool(1, (2, 1, 3, 2))
    stored = paper_stream(adapters, k, centred).stored
    for site in adapters["task0"]:
        for task, expected in slow_stream(adapters, site, k, centred).items():
            assert torch.allclose(dense(stored[task][site]), expected, atol=1e-9), (task, site)


def test_uncentred_is_exact_while_everything_fits(pool: Pool) -> None:
    adapters = pool(0, (2, 1, 3))
    assert max(errors(adapters, paper_once(adapters, 6)).values()) < 1e-12
    assert max(errors(adapters, paper_stream(adapters, 6)).values()) < 1e-12


def test_absorb_steps_are_the_stream_and_leave_the_old_state_alone(pool: Pool) -> None:
    adapters = pool(2, (2, 2, 2))
    state = PaperState(3, centred=False)
    states = [state]
    for task, adapter in adapters.items():
        states.append(paper_absorb(states[-1], task, adapter))
    whole = paper_stream(adapters, 3)
    assert [len(s.sites["block.0.query"].coefficients) for s in states[1:]] == [1, 2, 3]
    assert states[0].sites == {}
    last = paper_reconstruct(states[-1].sites["block.0.query"])
    for task, factors in last.items():
        assert torch.equal(factors.out, whole.stored[task]["block.0.query"].out)
    assert paper_numbers(states[-1]) == whole.numbers


def test_float32_runs_as_published(pool: Pool) -> None:
    adapters = pool(2, (2, 2, 2))
    state = PaperState(3, centred=True, dtype=torch.float32)
    for task, adapter in adapters.items():
        state = paper_absorb(state, task, adapter)
    site = state.sites["block.0.query"]
    assert site.basis.left.dtype == site.coefficients["task0"].out.dtype == torch.float32


def test_counts_bases_and_k_by_r_coefficients(pool: Pool) -> None:
    adapters = pool(0, (2, 1, 3))
    assert paper_once(adapters, 4).numbers == 2 * (4 * (11 + 9) + 2 * 4 * (2 + 1 + 3))


def test_missing_sites_and_zero_tasks(pool: Pool) -> None:
    first = pool(0, (2, 2, 2))
    adapters: dict[str, Adapter] = {
        "half": {"block.1.value": first["task0"]["block.1.value"]},
        "whole": first["task1"],
        "zero": {s: Factors(torch.zeros_like(f.out), f.in_) for s, f in first["task2"].items()},
        "nothing": {},
    }
    for result in (paper_once(adapters, 3), paper_stream(adapters, 3, centred=True)):
        assert set(result.stored["half"]) == {"block.1.value"}
        assert result.stored["nothing"] == {}
        assert errors(adapters, result)["zero"] == 0.0


# --- the known faults -------------------------------------------------------------------------------------------------


def test_fault_depends_on_the_gauge(pool: Pool) -> None:
    """(B G, A G^-T) is the same dW, and the paper's error changes; the optimum's does not."""
    adapters = pool(5, (3, 3, 3))
    g = torch.Generator().manual_seed(1)
    moved: dict[str, Adapter] = {}
    for task, adapter in adapters.items():
        mix = torch.diag(torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64))
        turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
        mix = turn @ mix
        moved[task] = {
            s: Factors(f.out.double() @ mix, f.in_.double() @ torch.linalg.inv(mix).mT) for s, f in adapter.items()
        }
    before, after = (mean(errors(a, paper_once(a, 4))) for a in (adapters, moved))
    assert abs(after - before) > 0.05
    assert mean(errors(moved, oracle(moved, 4))) == pytest.approx(mean(errors(adapters, oracle(adapters, 4))), rel=1e-6)


def test_fault_centring_loses_the_mean() -> None:
    """Adapters that share one strong column: the mean carries nearly everything and is not kept."""
    g = torch.Generator().manual_seed(0)
    column_out, column_in = torch.randn(40, 1, generator=g), torch.randn(40, 1, generator=g)
    adapters: dict[str, Adapter] = {
        f"task{t}": {
            "s": Factors(
                column_out + 0.02 * torch.randn(40, 4, generator=g), column_in + 0.02 * torch.randn(40, 4, generator=g)
            )
        }
        for t in range(6)
    }
    uncentred = errors(adapters, paper_once(adapters, 8))
    centred = errors(adapters, paper_once(adapters, 8, centred=True))
    assert max(uncentred.values()) < 0.05
    assert min(centred.values()) > 0.9


def test_fault_centring_one_adapter_loses_an_rth_although_it_fits() -> None:
    """share-method 3.2: N = 1, r = 8, k = 32 > r still loses about 1/r of the energy: 35 % relative error."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        adapter = {"s": Factors(torch.randn(96, 8, generator=g), torch.randn(96, 8, generator=g))}
        found.append(errors({"t": adapter}, paper_once({"t": adapter}, 32, centred=True))["t"])
    assert 0.3 < sum(found) / 20 < 0.55
    assert errors({"t": adapter}, paper_once({"t": adapter}, 32))["t"] < 1e-12


def shrink_curve(count: int, k: int, rank: int) -> tuple[list[float], list[float]]:
    """Error and relative norm of the first task after each of ``count`` merges of random adapters at fixed k."""
    g = torch.Generator().manual_seed(7)
    first: Adapter = {}
    state = PaperState(k, centred=False)
    curve, norms = [], []
    for t in range(count):
        adapter = {"s": Factors(torch.randn(64, rank, generator=g), torch.randn(64, rank, generator=g))}
        first = first or adapter
        state = paper_absorb(state, f"task{t}", adapter)
        kept = paper_reconstruct(state.sites["s"])["task0"]
        curve.append(errors({"task0": first}, Compressed("", {"task0": {"s": kept}}, 0, 0.0))["task0"])
        whole = first["s"].out.double() @ first["s"].in_.double().mT
        norms.append(float((kept.out @ kept.in_.mT).norm() / whole.norm()))
    return curve, norms


def test_fault_old_tasks_shrink_at_every_merge() -> None:
    """MATH section 1: exact while k fits, then the first task is lost merge by merge (0, .33, .58, .71 there)."""
    curve, norms = shrink_curve(count=40, k=16, rank=4)
    print(
        "\nerror of the first task after 4, 5, 10, 20, 40 merges:", [round(curve[n - 1], 3) for n in (4, 5, 10, 20, 40)]
    )
    assert max(curve[:4]) < 1e-12
    assert curve[4] > 0.1
    assert curve[39] > curve[9] > curve[4]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(norms))
