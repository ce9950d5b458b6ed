"""A task of a space in a PEFT model that runs: in place where it fits, anew where that is asked for."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from share_client.serving import hot_swap
from share_client.serving import hot_swap as _exported
from share_core.errors import AdapterError, UnsupportedAdapterError
from share_core.peft.reader import read_adapter
from share_core.space import task_adapter
from share_core.types import Factors, Space

peft: Any = pytest.importorskip("peft", reason="needs the package peft")
SITES = {"encoder.query": (8, 8), "encoder.value": (6, 8), "out": (4, 6)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 6)})
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.encoder["value"](torch.tanh(self.encoder["query"](x)))))
        return out


def inputs() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def backbone() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().eval()


def running(rank: int = 4, targets: tuple[str, ...] = ("query", "value", "out"), **more: Any) -> Any:
    """Return a PEFT model with adapters ``served``, the active one, and ``other``, both not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=rank, lora_alpha=3, target_modules=list(targets), init_lora_weights=False, lora_dropout=0.1, **more
        )
        model = peft.get_peft_model(backbone(), config, "served")
        model.add_adapter("other", copy.deepcopy(config))
        return model.eval()


@pytest.fixture(scope="module")
def space(make_space: Any) -> Space:
    found: Space = make_space(SITES, 3, 4, 4, 3, seed=3, missing=2)
    return found


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    out: Tensor = model(inputs())
    return out


@torch.no_grad()
def wanted(written: Any, space: Space, task: str) -> Tensor:
    out: Tensor = written(backbone(), space, task)(inputs())
    return out


def test_in_place_the_model_gives_the_task_and_nothing_else_changes(space: Space, written: Any, tmp_path: Path) -> None:
    model = running()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    model.set_adapter("other")
    other = outputs(model)
    model.set_adapter("served")
    for task in ("org/t1", "org/t0", "org/t2", "org/t1"):  # ranks 3 and 1, and sites left out: nothing stays behind
        assert hot_swap(model, "served", task_adapter(space, task)) is False
        assert torch.allclose(outputs(model), wanted(written, space, task), atol=1e-5)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    model.save_pretrained(tmp_path, selected_adapters=["served"])
    saved = read_adapter(tmp_path / "served").factors
    for site, factors in task_adapter(space, "org/t1").items():
        assert torch.allclose(saved[site].out @ saved[site].in_.T, factors.out @ factors.in_.T, atol=1e-5)
    model.set_adapter("other")
    assert outputs(model).equal(other)


def test_the_scale_of_rslora_is_honoured(space: Space, written: Any) -> None:
    model = running(use_rslora=True)
    hot_swap(model, "served", task_adapter(space, "org/t1"))
    assert torch.allclose(outputs(model), wanted(written, space, "org/t1"), atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "targets", "why"),
    [
        (2, ("query", "value", "out"), "needs rank 3, adapter 'served' has 2"),
        (4, ("query",), "does not change site"),
    ],
)
def test_what_does_not_fit_is_refused_whole_or_added_anew(
    space: Space, written: Any, rank: int, targets: tuple[str, ...], why: str
) -> None:
    model = running(rank, targets)
    before = outputs(model)
    factors = task_adapter(space, "org/t1")
    with pytest.raises(AdapterError, match=why):
        hot_swap(model, "served", factors)
    assert outputs(model).equal(before)
    model.set_adapter("other")
    other = outputs(model)
    model.set_adapter("served")
    assert hot_swap(model, "served", factors, recreate=True) is True
    assert model.active_adapters == ["served"]
    assert model.active_adapter == "served"
    assert torch.allclose(outputs(model), wanted(written, space, "org/t1"), atol=1e-5)
    assert hot_swap(model, "served", factors) is False
    model.set_adapter("other")
    assert outputs(model).equal(other)


def test_a_task_becomes_a_new_adapter_of_the_running_model(space: Space, written: Any) -> None:
    model = running()
    before = outputs(model)
    with pytest.raises(AdapterError, match="no LoRA adapter 'third'"):
        hot_swap(model, "third", task_adapter(space, "org/t0"))
    assert hot_swap(model, "third", task_adapter(space, "org/t0"), recreate=True) is True
    assert model.active_adapters == ["served"]
    assert outputs(model).equal(before)
    model.set_adapter("third")
    assert torch.allclose(outputs(model), wanted(written, space, "org/t0"), atol=1e-5)


def test_wrong_models_and_adapters_are_named(space: Space) -> None:
    factors = task_adapter(space, "org/t1")
    merged = running()
    merged.merge_adapter(["served"])
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        hot_swap(merged, "served", factors)
    with pytest.raises(UnsupportedAdapterError, match="is DoRA"):
        hot_swap(running(use_dora=True), "served", factors)
    site = next(iter(factors))
    wide = {site: Factors(torch.ones(9, 1), torch.ones(9, 1))}
    with pytest.raises(AdapterError, match=f"site {site!r}: the model has a weight of .* the task of 9 x 9"):
        hot_swap(running(), "served", wide)
    unknown = {"decoder.query": Factors(torch.ones(8, 1), torch.ones(8, 1))}
    model = running()
    before = outputs(model)
    with pytest.raises(AdapterError, match=r"no module 'decoder\.query'"):
        hot_swap(model, "served", unknown, recreate=True)
    assert outputs(model).equal(before)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"bias": "all"}, r"'served' has trained biases \(bias='all'\)"),
        ({"bias": "lora_only"}, r"'served' has trained biases \(bias='lora_only'\)"),
        ({"init_lora_weights": "pissa"}, "relative to a changed backbone"),
    ],
)
@pytest.mark.parametrize("recreate", [False, True])
def test_an_adapter_that_is_more_than_factors_is_refused_untouched(
    space: Space, options: dict[str, Any], why: str, recreate: bool
) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query", "value", "out"], **options)
    model = peft.get_peft_model(backbone(), config, "served").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedAdapterError, match=why):
        hot_swap(model, "served", task_adapter(space, "org/t1"), recreate)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    with pytest.raises(UnsupportedAdapterError, match="bias") if "bias" in options else nullcontext():
        hot_swap(model, "third", task_adapter(space, "org/t1"), recreate=True)  # its biases are in the backbone


def test_another_kind_of_adapter_is_named(space: Space) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["query", "value", "out"])
    model = peft.get_peft_model(backbone(), config, "served").eval()
    for name in ("served", "third"):
        with pytest.raises(UnsupportedAdapterError, match=r"peft_type is 'ADALORA'"):
            hot_swap(model, name, task_adapter(space, "org/t1"), recreate=True)


class Headed(Model):
    """Begins from the same weights and has one linear map more, which no space adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(super().forward(x))
        return out


def headed() -> Headed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Headed().eval()


def headed_lora(rank: int, **more: Any) -> Any:
    return peft.LoraConfig(r=rank, target_modules=["query", "value", "out"], init_lora_weights=False, **more)


@torch.no_grad()
def test_a_head_stays_in_place_and_is_never_lost(space: Space, written: Any) -> None:
    factors = task_adapter(space, "org/t1")
    small = peft.get_peft_model(headed(), headed_lora(1, modules_to_save=["head"]), "served").eval()
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    with pytest.raises(AdapterError, match=r"modules of its own \(head\), which adding it anew would lose"):
        hot_swap(small, "served", factors, recreate=True)
    assert small.active_adapters == ["served"]
    assert all(small.state_dict()[name].equal(tensor) for name, tensor in before.items())
    large = peft.get_peft_model(headed(), headed_lora(4, modules_to_save=["head"]), "served").eval()
    large.base_model.model.head.modules_to_save["served"].weight += 1
    assert hot_swap(large, "served", factors) is False
    expected = written(headed(), space, "org/t1")
    expected.head.weight += 1
    assert torch.allclose(outputs(large), outputs(expected), atol=1e-5)


def test_beside_an_adapter_with_a_head_another_one_is_added_anew(space: Space, written: Any) -> None:
    model = peft.get_peft_model(headed(), headed_lora(1), "served").eval()
    model.add_adapter("other", headed_lora(1, modules_to_save=["head"]))
    assert hot_swap(model, "served", task_adapter(space, "org/t1"), recreate=True) is True
    assert model.active_adapters == ["served"]
    assert torch.allclose(outputs(model), outputs(written(headed(), space, "org/t1")), atol=1e-5)


def test_planted_bugs_are_caught(space: Space, written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules[_exported.__module__]
    fill = module._fill

    def serves() -> bool:
        model = running()
        hot_swap(model, "served", task_adapter(space, "org/t1"))
        return torch.allclose(outputs(model), wanted(written, space, "org/t1"), atol=1e-5)

    assert serves()
    with monkeypatch.context() as planted:  # the scale is forgotten
        planted.setattr(module, "_fill", lambda target, rows, rank: fill(target, rows * 0.75, rank))
        assert not serves()
    with monkeypatch.context() as planted:  # what was there stays
        planted.setattr(torch.Tensor, "zero_", lambda self: self)
        assert not serves()
