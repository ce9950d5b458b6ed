"""Sites of every type: a change beside the module is the change of its weight, and PEFT would lay it out likewise.

The last test plants bugs and shows that the checks above catch them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from share_client.backbones.places import Place, place_of
from share_client.serving import hot_swap
from share_client.training import inject
from share_client.training.factors import FixedFactors, SpaceFactors
from share_client.training.private import PrivateLinear
from share_core.errors import ConfigError
from share_core.types import Core, Factors, SiteBasis

convolutions = st.fixed_dictionaries(
    {
        "in_channels": st.integers(1, 5),
        "out_channels": st.integers(1, 5),
        "kernel_size": st.sampled_from([1, 2, 3, (3, 1), (2, 3)]),
        "stride": st.sampled_from([1, 2, (2, 1)]),
        "padding": st.sampled_from([0, 1, (0, 2)]),
        "dilation": st.sampled_from([1, 2]),
        "padding_mode": st.sampled_from(["zeros", "reflect", "circular"]),
        "bias": st.booleans(),
    }
)


def random_conv(settings_: dict[str, Any], seed: int) -> tuple[nn.Conv2d, Tensor]:
    """Return a convolution and an input for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(**settings_)
        return conv, torch.randn(2, settings_["in_channels"], 7, 6)


def random_factors(place: Place, rank: int, seed: int) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(place.d_out, rank, generator=draw), torch.randn(place.d_in, rank, generator=draw))


def with_change(place: Place, matrix: Tensor) -> nn.Module:
    """Return a copy of the module whose weight has changed."""
    changed = copy.deepcopy(place.module)
    changed.weight = nn.Parameter(place.as_stored(place.matrix().detach() + matrix))
    return changed


def check_place(place: Place, x: Tensor, rank: int, seed: int) -> None:
    """The change beside the module, and the gradient of its matrix, are those of the weight itself."""
    factors = random_factors(place, rank, seed)
    whole = with_change(place, factors.out @ factors.in_.T)
    wanted = whole(x)
    got = inject.adapted(place, FixedFactors(factors.out, factors.in_))(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max() + 1))
    probe = inject.probed(place)
    y = probe(x)
    torch.testing.assert_close(y, place.module(x))
    (gradient,) = torch.autograd.grad((y**2).sum(), [probe.change])
    (expected,) = torch.autograd.grad((place.module(x) ** 2).sum(), [place.module.weight])  # type: ignore[arg-type]
    assert isinstance(expected, Tensor)
    as_matrix = expected.T if place.kind == "conv1d_transposed" else expected.reshape(place.d_out, place.d_in)
    torch.testing.assert_close(gradient, as_matrix, rtol=1e-4, atol=1e-4 * float(as_matrix.abs().max() + 1))


@settings(max_examples=40, deadline=None)
@given(convolutions, st.integers(1, 4), st.integers(0, 2**16))
def test_a_change_beside_a_convolution_is_that_of_its_weight(conf: dict[str, Any], rank: int, seed: int) -> None:
    conv, x = random_conv(conf, seed)
    check_place(place_of("c", conv), x, rank, seed)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv3d", "Conv1D"])
def test_a_change_beside_other_modules_is_that_of_their_weight(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module: nn.Module
        if kind == "Conv1D":
            pytest.importorskip("transformers", reason="Conv1D is a class of transformers")
            from transformers.pytorch_utils import Conv1D

            module, x = Conv1D(5, 3), torch.randn(2, 4, 3)  # type: ignore[no-untyped-call]
        elif kind == "linear":
            module, x = nn.Linear(3, 5), torch.randn(2, 4, 3)
        elif kind == "conv1d":
            module, x = nn.Conv1d(3, 5, 3, stride=2), torch.randn(2, 3, 9)
        else:
            module, x = nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 3, 5)
    place = place_of("m", module)
    assert place.matrix().shape == (place.d_out, place.d_in)
    check_place(place, x, 2, 7)


def test_the_layout_is_that_of_peft() -> None:
    """Our factors, written into PEFT's LoRA of a convolution by the hot swap, give what ours give."""
    peft = pytest.importorskip("peft", reason="PEFT's layers are compared with")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, (1, 3)))
        x = torch.randn(2, 3, 9, 8)
    net.requires_grad_(False)
    places = {site: place_of(site, net.get_submodule(site)) for site in ("0", "2")}
    factors = {site: random_factors(place, 3, 4) for site, place in places.items()}
    modules = [inject.adapted(places[s], FixedFactors(f.out, f.in_)) for s, f in factors.items()]
    wanted = modules[1](nn.functional.relu(modules[0](x)))
    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0", "2"]))
    hot_swap(model, "default", factors)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert (net(x) - wanted).abs().max() > 0.1


@settings(max_examples=20, deadline=None)
@given(convolutions, st.integers(0, 2**16))
def test_patches_of_dp_sgd_give_the_same_convolution(conf: dict[str, Any], seed: int) -> None:
    conv, x = random_conv({**conf, "padding_mode": "zeros"}, seed)
    place = place_of("c", conv)
    draw = torch.Generator().manual_seed(seed)
    k_out, k_in = min(2, place.d_out), min(2, place.d_in)
    basis = SiteBasis(
        torch.linalg.qr(torch.randn(place.d_out, k_out, generator=draw)).Q,
        torch.linalg.qr(torch.randn(place.d_in, k_in, generator=draw)).Q,
    )
    core = Core(torch.randn(k_out, 1, generator=draw), torch.randn(k_in, 1, generator=draw))
    change = SpaceFactors(basis, core, torch.randn(place.d_in, 1, generator=draw))
    nn.init.normal_(change.free_out, generator=draw)
    wanted = inject.adapted(place, change)(x)
    torch.testing.assert_close(PrivateLinear(place, change)(x), wanted, rtol=1e-4, atol=1e-4)


def test_padding_that_patches_cannot_have_is_refused_for_dp_sgd() -> None:
    place = place_of("stem", nn.Conv2d(2, 2, 3, padding="same"))
    change = SpaceFactors(
        SiteBasis(torch.eye(2)[:, :1], torch.eye(18)[:, :1]),
        Core(torch.ones(1, 1), torch.ones(1, 1)),
        torch.ones(18, 1),
    )
    with pytest.raises(ConfigError, match=r"site 'stem' .* dp-sgd takes Conv2d with zero padding"):
        PrivateLinear(place, change)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "grouped convolution"),
        (nn.Embedding(3, 2), "Embedding"),
        (nn.MultiheadAttention(4, 2).out_proj, "MultiheadAttention"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named(module: nn.Module, words: str) -> None:
    with pytest.raises(ConfigError, match=f"site 'odd' is .*{words}"):
        place_of("odd", module)


def _one_convolution() -> None:
    conv, x = random_conv({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "stride": 2}, 1)
    check_place(place_of("c", conv), x, 2, 1)


def _transposed(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The channels last in a patch, as an unwary reader would lay them out."""
    kernel = base.weight
    assert isinstance(kernel, Tensor)
    shaped = weight.reshape(-1, *kernel.shape[2:], kernel.shape[1]).movedim(-1, 1)
    return base._conv_forward(x, shaped, None)  # type: ignore[no-any-return,operator]


def _without_stride(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    kernel = base.weight
    assert isinstance(kernel, Tensor)
    return nn.functional.conv2d(x, weight.reshape(-1, *kernel.shape[1:]), padding="same")


@pytest.mark.parametrize("bug", [_transposed, _without_stride])
@pytest.mark.parametrize("check", [_one_convolution, test_the_layout_is_that_of_peft])
def test_the_checks_catch_a_wrong_layout(check: Callable[[], None], bug: Any) -> None:
    with mock.patch.object(inject, "_convolved", bug), pytest.raises((AssertionError, RuntimeError)):
        check()
