"""A backbone that is not the space's is refused with both fingerprints and the likely cause."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from share_core.errors import SpaceMismatchError
from share_core.fingerprint import check_backbone, describe_space, fingerprint_weight


def make_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"layer.{n}.query": torch.randn(12, 8, generator=draw) * 1e-6 for n in range(3)}


def refusal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Return what is said of a backbone with ``ours`` at a space of ``theirs``."""
    with pytest.raises(SpaceMismatchError) as caught:
        check_backbone(describe_space("base", theirs), ours)
    return str(caught.value)


def test_both_fingerprints_are_named() -> None:
    weights = make_weights()
    ours = {**weights, "layer.1.query": weights["layer.1.query"] * 1.1}
    message = refusal(ours, weights)
    for side in (weights, ours):
        assert fingerprint_weight("layer.1.query", side["layer.1.query"])[:16] in message
    assert "1 of 3 sites have other weights and the rest are equal" in message
    assert "an adapter was merged into 'base'" in message


def test_causes_are_told_apart() -> None:
    weights = make_weights()
    half = {name: weight.to(torch.float16).float() for name, weight in weights.items()}
    assert "made from a float16 copy of these weights" in refusal(weights, half)
    loaded_half = {name: weight.to(torch.float16) for name, weight in weights.items()}
    assert "this one is loaded in float16 (dtype)" in refusal(loaded_half, weights)
    other = {name: weight + 1e-6 for name, weight in weights.items()}
    assert "another revision or a fine-tuned copy of 'base'" in refusal(other, weights)
    wrapped = {f"bert.{name}": weight for name, weight in weights.items()}
    assert "it calls it 'bert.layer.0.query', so probably it is the same model inside another" in refusal(
        wrapped, weights
    )
    assert "it is another architecture, or other sites were chosen" in refusal(
        {"else": weights["layer.0.query"]}, weights
    )
    assert "another size of the architecture" in refusal({name: w[:6] for name, w in weights.items()}, weights)
    check_backbone(describe_space("base", weights), {name: w.to(torch.bfloat16) for name, w in weights.items()})
