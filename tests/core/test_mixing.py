"""Many clients on one task: core arithmetic against dense arithmetic, and the rules' weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from share_core.cold_start import backbone_bases
from share_core.errors import ConfigError, NonFiniteError, TensorShapeError
from share_core.mixing import Contribution, Staleness, average, change_of, contributor_weights, fedasync, fedbuff
from share_core.streaming.fold import fold
from share_core.streaming.state import StreamPolicy, seeded_stream
from share_core.streaming.view import bases_of, space_of
from share_core.types import Core, Cores, Factors, SiteSpec, SpaceSpec


def cores(seed: int, rank: int = 2) -> Cores:
    g = torch.Generator().manual_seed(seed)
    return {"s": Core(torch.randn(6, rank, generator=g), torch.randn(5, rank, generator=g))}


def dense(own: Cores) -> Tensor:
    return own["s"].out.double() @ own["s"].in_.double().T if "s" in own else torch.zeros(6, 5, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) < 1e-5 * (1 + float(b.norm()))


def test_fedasync_is_the_dense_mixture() -> None:
    rule = Staleness("polynomial", a=0.5)
    got = fedasync(cores(0), Contribution("x", cores(1), staleness=3), 0.6, rule, rank=16)
    a = 0.6 * 4**-0.5
    assert close(dense(got), (1 - a) * dense(cores(0)) + a * dense(cores(1)))


def test_fedbuff_adds_the_average_change() -> None:
    rule = Staleness("hinge", a=1.0, b=1.0)
    base = cores(9)
    changes = [Contribution("x", change_of(cores(n), base, 16), staleness=n) for n in range(3)]
    got = fedbuff(cores(5), changes, rate=0.8, staleness=rule, rank=32)
    expected = dense(cores(5)) + 0.8 / 3 * sum(rule.weight(n) * (dense(cores(n)) - dense(base)) for n in range(3))
    assert close(dense(got), expected)
    assert fedbuff(base, [], 1.0, rule, 4) is base


def test_averaging_factors_instead_of_cores_is_caught() -> None:
    """MATH section 1: the mean of factors is not the mean of products."""
    a, b = cores(0), cores(1)
    wrong = {"s": Core((a["s"].out + b["s"].out) / 2, (a["s"].in_ + b["s"].in_) / 2)}
    right = average([Contribution("x", a), Contribution("y", b)], Staleness("constant"), rank=16)
    assert close(dense(right), (dense(a) + dense(b)) / 2)
    assert not close(dense(wrong), dense(right))


def test_organisations_weigh_equally_however_often_they_send() -> None:
    many = [Contribution("loud", cores(n)) for n in range(9)] + [Contribution("quiet", cores(9))]
    weights = contributor_weights(many, Staleness("constant"))
    assert sum(weights) == pytest.approx(1)
    assert sum(weights[:9]) == pytest.approx(0.5)
    assert weights[9] == pytest.approx(0.5)


def test_declared_rows_count_up_to_the_cap_only() -> None:
    pair = [Contribution("a", cores(0), rows=10**9), Contribution("b", cores(1), rows=50)]
    assert contributor_weights(pair, Staleness("constant")) == pytest.approx([0.5, 0.5])
    assert contributor_weights(pair, Staleness("constant"), rows_cap=100) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("rule", "n", "expected"),
    [
        (Staleness("constant"), 50, 1.0),
        (Staleness("polynomial", a=1.0), 3, 0.25),
        (Staleness("hinge", a=0.5, b=2), 2, 1.0),
        (Staleness("hinge", a=0.5, b=2), 4, 0.5),
    ],
)
def test_staleness_rules(rule: Staleness, n: int, expected: float) -> None:
    assert rule.weight(n) == pytest.approx(expected)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be newer"):
        Staleness().weight(-1)
    with pytest.raises(ConfigError, match="mixing rate"):
        fedasync(cores(0), Contribution("x", cores(1)), 0.0, Staleness(), 4)
    with pytest.raises(ConfigError, match="no contribution"):
        contributor_weights([], Staleness())
    with pytest.raises(ConfigError, match="staleness rule"):
        Staleness("linear")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a >= 0"):
        Staleness(a=-1)


# --- cold start ----------------------------------------------------------------------------------------------------

SPEC = SpaceSpec("sha256:test", "test", {"s": SiteSpec("s", 12, 9, "")}, k_max=6)


def test_cold_start_is_the_backbones_strongest_directions_with_fixed_signs() -> None:
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    basis = backbone_bases({"s": weight}, SPEC, 4)["s"]
    best = torch.linalg.matrix_norm(weight.double() - _rank(weight, 4))
    left, right = basis.left.double(), basis.right.double()
    got = torch.linalg.matrix_norm(weight.double() - left @ (left.T @ weight.double() @ right) @ right.T)
    assert float(got) == pytest.approx(float(best), rel=1e-6)
    assert bool((basis.left.gather(0, basis.left.abs().argmax(0, keepdim=True)) > 0).all())
    again = backbone_bases({"s": weight.clone()}, SPEC, 4)["s"]
    assert torch.equal(basis.left, again.left) and torch.equal(basis.right, again.right)


def _rank(weight: Tensor, k: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double())
    best: Tensor = u[:, :k] * s[:k] @ vh[:k]
    return best


def test_a_seeded_space_gives_way_to_what_tasks_need() -> None:
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    state = seeded_stream(backbone_bases({"s": weight}, SPEC, 6))
    g = torch.Generator().manual_seed(5)
    adapter = {"s": Factors(torch.randn(12, 3, generator=g), torch.randn(9, 3, generator=g))}
    state = fold(state, "t", adapter, StreamPolicy(k_max=6)).state
    basis, core = bases_of(state)["s"], space_of(state).cores["t"]["s"]
    assert basis.k_out == 6
    made = (basis.left @ core.out) @ (basis.right @ core.in_).T
    whole = adapter["s"].out @ adapter["s"].in_.T
    assert float((made - whole).norm()) < 1e-5 * float(whole.norm())


def test_cold_start_refuses_what_does_not_fit() -> None:
    with pytest.raises(TensorShapeError, match="1 to 6 directions"):
        backbone_bases({"s": torch.ones(12, 9)}, SPEC, 7)
    with pytest.raises(TensorShapeError, match="expected 12 x 9, got none"):
        backbone_bases({}, SPEC, 2)
    with pytest.raises(NonFiniteError):
        backbone_bases({"s": torch.full((12, 9), float("nan"))}, SPEC, 2)
