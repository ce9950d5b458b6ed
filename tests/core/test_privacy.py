"""The accountant against dp-accounting, declarations from strangers, and noise on coefficients."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_core.errors import RequestError
from share_core.linalg import product_norm
from share_core.privacy import (
    CoefficientNoise,
    PrivacyLedger,
    SampleNoise,
    accountant,
    declaration_from_text,
    declaration_to_text,
    gaussian_epsilon,
    least_noise,
    noisy_cores,
    read_ledger_events,
    spend,
    spend_all,
)
from share_core.types import Core, SiteBasis

Releases = list[tuple[float, int]]
NOISE = CoefficientNoise(noise_multiplier=4.0, clip=1.0, delta=1e-6)
SAMPLES = SampleNoise(2.0, 1e-5, 1.1, 1.0, 60, 0.05)


def schedules(count: int, seed: int) -> list[tuple[Releases, float]]:
    """Return random releases, one to eight kinds of up to 1,000, whose epsilons reach from hundredths to hundreds."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        kinds = [(10 ** draw.uniform(-1, 1), int(10 ** draw.uniform(0, 3))) for _ in range(draw.randint(1, 8))]
        scale = math.sqrt(sum(number / (2 * noise**2) for noise, number in kinds) / 10 ** draw.uniform(-4, 1.5))
        made.append(([(noise * scale, number) for noise, number in kinds], 10 ** draw.uniform(-12, -2)))
    return made


def theirs(releases: Releases, delta: float) -> float:
    dp_accounting = pytest.importorskip("dp_accounting", reason="needs the extra privacy")
    accounting = dp_accounting.rdp.RdpAccountant()
    for noise, count in releases:
        accounting.compose(dp_accounting.GaussianDpEvent(noise), count)
    return float(accounting.get_epsilon(delta))


def worst_difference(epsilon: Callable[[Releases, float], float], count: int) -> float:
    return max(abs(epsilon(*one) - theirs(*one)) for one in schedules(count, 7))


def test_the_accountant_is_that_of_dp_accounting() -> None:
    assert worst_difference(gaussian_epsilon, 200) <= 1e-9


def test_an_optimistic_accountant_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "ORDERS", (*accountant.ORDERS, *(n + 0.55 for n in range(1, 200))))
    assert worst_difference(gaussian_epsilon, 20) > 1e-9, "orders that dp-accounting does not have go below it"
    monkeypatch.undo()
    honest = accountant.epsilon_at
    monkeypatch.setattr(accountant, "epsilon_at", lambda order, rdp, delta: honest(order, rdp, 2 * delta))
    assert worst_difference(gaussian_epsilon, 20) > 1e-9


@given(st.floats(0.3, 1e3), st.integers(1, 1000), st.floats(1e-12, 1e-2), st.floats(1.001, 10.0))
@settings(max_examples=100, deadline=None)
def test_epsilon_falls_with_noise_and_rises_with_releases(z: float, count: int, delta: float, factor: float) -> None:
    base = gaussian_epsilon([(z, count)], delta)
    assert gaussian_epsilon([(z * factor, count)], delta) <= base <= gaussian_epsilon([(z, count + 1)], delta)
    assert gaussian_epsilon([(z, count)], delta / factor) >= base
    assert gaussian_epsilon([(z, 1)] * min(count, 20), delta) == pytest.approx(
        gaussian_epsilon([(z, min(count, 20))], delta)
    )


@given(st.floats(0.05, 50), st.floats(1e-10, 1e-3))
@settings(max_examples=40, deadline=None)
def test_least_noise_spends_what_it_may_and_hardly_less(epsilon: float, delta: float) -> None:
    z = least_noise(epsilon, lambda one: gaussian_epsilon([(one, 1)], delta))
    assert gaussian_epsilon([(z, 1)], delta) <= epsilon
    assert gaussian_epsilon([(z * (1 - 1e-4), 1)], delta) > epsilon
    with pytest.raises(ValueError, match="no noise multiplier"):
        least_noise(epsilon, lambda one: math.inf)


def test_the_ledger_counts_every_noisy_update_at_the_smallest_delta() -> None:
    ledger = spend_all([NOISE, None, SAMPLES, NOISE, CoefficientNoise(8.0, 2.0, 1e-7)])
    assert ledger == PrivacyLedger(((4.0, 2), (8.0, 1)), 1e-7)
    assert ledger.epsilon == gaussian_epsilon([(4.0, 2), (8.0, 1)], 1e-7)
    assert read_ledger_events(ledger.events_to_text(), ledger.delta) == ledger
    assert spend(ledger, SAMPLES) is ledger
    assert spend_all([None, SAMPLES]) is None


def test_declarations_survive_the_journey() -> None:
    for declared in (NOISE, SAMPLES):
        text = declaration_to_text(declared)
        assert declaration_from_text(text) == declared
        assert list(json.loads(text)) == sorted(json.loads(text))
    assert declaration_from_text("") is None


GOOD = json.loads(declaration_to_text(NOISE))


def written(**changes: Any) -> str:
    body = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        "1",
        '"coefficients"',
        "[" * 900,
        " " * 2000,
        written(mechanism="none"),
        written(mechanism=["coefficients"]),
        written(clip=...),
        written(extra=1.0),
        written(clip="1.0"),
        written(clip=True),
        written(clip=1),
        written(clip=0.0),
        written(clip=-1.0),
        written(noise_multiplier=1e-9),
        written(noise_multiplier=1e300),
        written(delta=0.0),
        written(delta=1.0),
        written(delta=None),
        written(clip=float("nan")),
        written(clip=float("inf")),
        written().replace(":", ": "),
        written().replace("1.0", "1.00"),
        written().replace("}", ',"clip":2.0}'),
        declaration_to_text(SAMPLES).replace('"steps":60', '"steps":60.0'),
        declaration_to_text(SAMPLES).replace('"steps":60', '"steps":0'),
        declaration_to_text(SAMPLES).replace('"sample_rate":0.05', '"sample_rate":1.5'),
    ],
)
def test_what_is_not_canonical_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"^privacy: "):
        declaration_from_text(text)


def bases(sizes: Sequence[tuple[int, int]]) -> dict[str, SiteBasis]:
    return {f"s{n}": SiteBasis(torch.eye(20, left), torch.eye(16, right)) for n, (left, right) in enumerate(sizes)}


def cores(sizes: Sequence[tuple[int, int]], scale: float, draw: torch.Generator) -> dict[str, Core]:
    return {
        f"s{n}": Core(scale * torch.randn(left, 2, generator=draw), torch.randn(right, 2, generator=draw))
        for n, (left, right) in enumerate(sizes)
        if left and right
    }


def total_norm(made: dict[str, Core]) -> float:
    return math.sqrt(sum(float(product_norm(core.out, core.in_)) ** 2 for core in made.values()))


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=4),
    st.floats(1e-3, 1e3),
    st.floats(1e-2, 1e2),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_clipping_bounds_what_one_update_can_move(
    sizes: list[tuple[int, int]], scale: float, clip: float, seed: int
) -> None:
    """With no noise, what is released has at most the norm that the noise is measured in: the sensitivity."""
    draw = torch.Generator().manual_seed(seed)
    given_cores = cores(sizes, scale, draw)
    zero = lambda shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
    made = noisy_cores(given_cores, bases(sizes), clip, 1.0, 8, zero)
    assert total_norm(made) <= clip * (1 + 1e-5)
    if total_norm(given_cores) <= clip:
        assert total_norm(made) == pytest.approx(total_norm(given_cores), rel=1e-5, abs=1e-12)
    # Which sites are there, and of which size, tells nothing of the update: an empty one gives the same.
    empty = noisy_cores({}, bases(sizes), clip, 1.0, 8, zero)
    assert {s: (c.out.shape, c.in_.shape) for s, c in made.items()} == {
        s: (c.out.shape, c.in_.shape) for s, c in empty.items()
    }


def test_every_entry_of_every_site_gets_the_noise() -> None:
    asked: list[tuple[int, ...]] = []

    def ones(shape: tuple[int, ...]) -> Tensor:
        asked.append(shape)
        return torch.ones(shape, dtype=torch.float64)

    made = noisy_cores({}, bases([(3, 5), (0, 4), (2, 2)]), 2.0, 1.5, 8, ones)
    assert sorted(asked) == [(2, 2), (3, 5)]
    for name, shape in (("s0", (3, 5)), ("s2", (2, 2))):
        torch.testing.assert_close(made[name].out @ made[name].in_.T, torch.full(shape, 3.0))
