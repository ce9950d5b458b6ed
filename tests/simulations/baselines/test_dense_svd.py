"""FlexLoRA's aggregation against its definition, and PEFT's own svd combination against it."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from share_core.errors import ConfigError
from share_core.types import Adapter, Factors
from share_simulations.baselines.dense_svd import dense_svd
from share_simulations.baselines.peft_svd import peft_svd
from share_simulations.baselines.types import errors

Pool = Callable[..., dict[str, Adapter]]
Dense = Callable[[Factors], Tensor]


def uneven(pool: Pool) -> dict[str, Adapter]:
    adapters = pool(0, (2, 1, 3))
    return {**adapters, "half": {"block.0.query": adapters["task0"]["block.0.query"]}}


def truncated(matrix: Tensor, k: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u[:, :k] * s[:k] @ vh[:k]
    return nearest


def mean_of(adapters: dict[str, Adapter], site: str, dense: Dense) -> Tensor:
    return torch.stack([dense(a[site]) for a in adapters.values() if site in a]).sum(dim=0) / len(adapters)


@pytest.mark.parametrize("k", [1, 3, 9, 50])
def test_dense_svd_is_the_truncated_mean(pool: Pool, dense: Dense, k: int) -> None:
    adapters = uneven(pool)
    result = dense_svd(adapters, k)
    for site in ("block.0.query", "block.1.value"):
        expected = truncated(mean_of(adapters, site, dense), k)
        for task in adapters:
            assert torch.allclose(dense(result.stored[task][site]), expected, atol=1e-12)
    assert result.numbers == 2 * min(k, 9) * (11 + 9)


def test_one_adapter_for_all_fits_one_task_only_when_all_are_alike(pool: Pool) -> None:
    adapters = pool(0, (2, 2, 2), spread=0.0)
    assert min(errors(adapters, dense_svd(adapters, 9)).values()) > 0.5
    same = {str(i): adapters["task0"] for i in range(3)}
    assert max(errors(same, dense_svd(same, 2)).values()) < 1e-12


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_peft_gives_the_truncated_sum_or_mean(pool: Pool, dense: Dense, k: int, mean: bool) -> None:
    pytest.importorskip("peft", reason="pip install peft==0.21.2")
    adapters = uneven(pool)
    result = peft_svd(adapters, k, mean)
    scale = 1.0 if mean else len(adapters)
    for site in ("block.0.query", "block.1.value"):
        expected = truncated(mean_of(adapters, site, dense) * scale, k)
        assert torch.allclose(dense(result.stored["half"][site]), expected, atol=1e-4 * float(expected.norm()))
    assert result.numbers == 2 * k * (11 + 9)


def test_peft_and_flexlora_agree_on_real_adapters(minilm: dict[str, Adapter]) -> None:
    pytest.importorskip("peft", reason="pip install peft==0.21.2")
    one, other = (errors(minilm, method(minilm, 32)) for method in (peft_svd, dense_svd))
    assert one == pytest.approx(other, abs=1e-4)


def test_without_peft_it_says_what_to_install(pool: Pool) -> None:
    with (
        mock.patch.dict("sys.modules", {"peft": None}),
        pytest.raises(ConfigError, match=r"pip install peft==0\.21\.2"),
    ):
        peft_svd(pool(0, (2, 2)), 2)
