"""What a stream refuses by name, and the least it can be given. Planted bug: a missing check for NaN."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from share_core.errors import NonFiniteError, TensorShapeError
from share_core.streaming.fold import fold
from share_core.streaming.state import StreamPolicy, empty_stream
from share_core.streaming.view import bases_of, ledger_of, space_of
from share_core.types import Factors, SiteSpec

SITES = {"a.query": SiteSpec("a.query", 24, 18, ""), "a.value": SiteSpec("a.value", 14, 30, "")}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite_is_refused_by_name(value: float, side: int) -> None:
    pair = [torch.ones(24, 2), torch.ones(18, 2)]
    pair[side][3, 1] = value
    with pytest.raises(NonFiniteError, match=r"a\.query.*1 values"):
        fold(empty_stream(SITES), "t", {"a.query": Factors(*pair)}, StreamPolicy())


def test_without_the_finite_check_one_value_poisons_everything() -> None:
    bad = torch.ones(24, 2)
    bad[0, 0] = float("nan")
    told = (RuntimeError, AssertionError)  # by the decomposition (LinAlgError), or by what is looked at afterwards
    with mock.patch("share_core.streaming.fold.require_finite", lambda *_: None), pytest.raises(told):
        state = fold(empty_stream(SITES), "t", {"a.query": Factors(bad, torch.ones(18, 2))}, StreamPolicy()).state
        assert all(bool(torch.isfinite(b.left).all()) for b in bases_of(state).values())
        assert math.isfinite(ledger_of(state)["t"].bound)
        assert bases_of(state)["a.query"].k_out == 1


def test_no_site_at_all_is_a_task_that_changes_nothing() -> None:
    folded = fold(empty_stream(SITES), "t", {}, StreamPolicy())
    assert folded.transition == {}
    assert space_of(folded.state).cores == {"t": {}}


def test_unknown_site_and_wrong_shape_are_refused_by_name() -> None:
    with pytest.raises(TensorShapeError, match="nowhere"):
        fold(empty_stream(SITES), "t", {"nowhere": Factors(torch.ones(3, 1), torch.ones(3, 1))}, StreamPolicy())
    with pytest.raises(TensorShapeError, match=r"expected factors 24 x r and 18 x r, got \(25, 1\)"):
        fold(empty_stream(SITES), "t", {"a.query": Factors(torch.ones(25, 1), torch.ones(18, 1))}, StreamPolicy())
