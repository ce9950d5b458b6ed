"""What was read and written again is loaded by the real PEFT library into a model that computes the same.

The property, ``round_trip``: for an adapter that PEFT made and saved, (1) the factors that are read are what PEFT adds
to every weight; (2) the written adapter loads with non-zero factors at exactly the same modules; (3) every change of a
weight and the model's output agree. PEFT leaves B zero where it cannot place a tensor, so zeros are an error.

Planted bugs: scale forgotten, rsLoRA ignored, alpha_pattern ignored, prefix lost, ranks of the written file not given,
written alpha doubled, an embedding written like a linear layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import share_core.peft.writer
from share_core.errors import AdapterError
from share_core.linalg import difference_norm, product_norm
from share_core.peft.config import PeftConfig
from share_core.peft.export import PeftExport
from share_core.peft.names import site_of, tensor_key
from share_core.peft.reader import PeftAdapter, read_adapter
from share_core.peft.writer import write_adapter

TOKENS = 40
DEFAULTS: Mapping[str, Any] = {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 10}
TOLERANCE = 1e-5
"""Relative; factors and models are float32."""


def _bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )


class Mixed(nn.Module):
    """Every kind of layer; ``fc`` is a dotted suffix of ``block.fc``, and ``tail.fc`` must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 6)
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "conv": nn.Conv2d(1, 4, (3, 2)), "line": nn.Conv1d(4, 3, 2)})
        self.tail = nn.ModuleDict({"fc": nn.Linear(3, 3)})

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.block["fc"](torch.tanh(self.fc(self.table(input_ids))))
        x = self.block["line"](self.block["conv"](x.unsqueeze(1)).flatten(2))
        result: Tensor = self.tail["fc"](x.mean(2))
        return result


def _model(name: str) -> nn.Module:
    torch.manual_seed(7)
    makers: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: BertModel(_bert_config()),
        "bert_classifier": lambda: BertForSequenceClassification(_bert_config()),
        "distilbert": lambda: DistilBertModel(
            DistilBertConfig(
                vocab_size=TOKENS, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
        "mixed": Mixed,
    }
    return makers[name]().eval()


@dataclass(frozen=True)
class Case:
    """One adapter."""

    model: str = "bert"
    """One of ``bert``, ``bert_classifier``, ``distilbert``, ``gpt2``, ``mixed``."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of LoraConfig; those of ``DEFAULTS`` where it has none."""
    dtype: torch.dtype = torch.float32
    """Of the tensors in the file."""


def make(case: Case, directory: Path) -> Path:
    """Save a random adapter with PEFT."""
    model = get_peft_model(_model(case.model), LoraConfig(**{**DEFAULTS, **case.lora}))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or (parameter.requires_grad and name.endswith("bias")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(directory), save_embedding_layers=False)
    file = directory / "adapter_model.safetensors"
    if case.dtype != torch.float32:
        save_file({key: tensor.to(case.dtype) for key, tensor in load_file(file).items()}, file)
    return directory


def load(case: Case, directory: Path) -> PeftModel:
    """Load an adapter with PEFT into the case's model. Tensors it cannot place must show in the result."""
    return PeftModel.from_pretrained(_model(case.model), str(directory)).eval()


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """Return what LoRA adds to each weight, by module name."""
    layers: dict[str, Any] = {n: layer for n, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in layers.items()
    }


def _output(model: nn.Module) -> Tensor:
    tokens = torch.arange(2 * 9).reshape(2, 9) % TOKENS
    with torch.no_grad():
        result = model(input_ids=tokens)
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    """Compare relative to the largest entry."""
    apart = float((got - expected).abs().max())
    assert apart <= TOLERANCE * max(float(expected.abs().max()), 1e-3), f"{what}: {apart:.2e} apart"


def assert_reads_as_peft_does(adapter: PeftAdapter, expected: Mapping[str, Tensor]) -> None:
    """Every site's ``out @ in_.T`` is what PEFT adds to the weight."""
    assert {site.module for site in adapter.sites.values()} == set(expected)
    for name, site in adapter.sites.items():
        factors, delta = adapter.factors[name], expected[site.module]
        product = factors.out @ factors.in_.T
        assert product.shape == site.matrix_shape
        assert tuple(delta.shape) == site.weight_shape
        assert_close(product, delta.T if site.kind in ("embedding", "conv1d_transposed") else delta.flatten(1), name)


def round_trip(case: Case, directory: Path, **options: Any) -> PeftAdapter:
    """Make, read, write, load; assert that nothing changed. Return what was read."""
    source = make(case, directory / "made")
    original = load(case, source)
    adapter = read_adapter(source)
    assert_reads_as_peft_does(adapter, deltas(original))
    written = directory / "written"
    write_adapter(written, adapter.factors, adapter.export, extra=adapter.extra, **options)
    again = load(case, written)
    expected, got = deltas(original), deltas(again)
    assert set(got) == set(expected)
    for name, delta in got.items():
        assert bool(delta.any()), f"{name}: PEFT loaded zeros"
        assert_close(delta, expected[name], name)
    assert_close(_output(again), _output(original), "output")
    assert not torch.equal(_output(again), _output(_model(case.model)))
    return adapter


# What PEFT 0.21.2 says with transformers 5.23 and what it does then is compared.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TWO_RANKS = {"r": 3, "lora_alpha": 5, "rank_pattern": {"layer.1.attention.self.value": 5, r"layer\.[23].*query": 2}}
CASES = {
    "plain": Case(),
    "rank_pattern": Case(lora=TWO_RANKS),
    "alpha_pattern": Case(lora={**TWO_RANKS, "alpha_pattern": {"query": 9, "value": 1}}),
    "anchored pattern": Case(lora={"rank_pattern": {"^encoder.layer.0.attention.self.query": 1}}),
    "rslora": Case(lora={"r": 6, "lora_alpha": 5, "use_rslora": True}),
    "rslora with patterns": Case(lora={**TWO_RANKS, "use_rslora": True, "alpha_pattern": {"query": 9}}),
    "regex targets": Case(lora={"target_modules": r".*layer\.[01]\..*(query|dense)"}),
    "all-linear": Case(lora={"target_modules": "all-linear"}),
    "layers_to_transform": Case(lora={"layers_to_transform": [1, 3]}),
    "one layer": Case(lora={"layers_to_transform": 2, "layers_pattern": "layer"}),
    "exclude_modules": Case(lora={"exclude_modules": ["encoder.layer.0.attention.self.value"]}),
    "gaussian": Case(lora={"init_lora_weights": "gaussian"}),
    "orthogonal": Case(lora={"init_lora_weights": "orthogonal"}),
    "random init": Case(lora={"init_lora_weights": False}),
    "float16": Case(dtype=torch.float16),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bias all": Case(lora={"bias": "all"}),
    "bias lora_only": Case(lora={"bias": "lora_only"}),
    "classifier": Case("bert_classifier", {"task_type": "SEQ_CLS"}),
    "classifier with modules_to_save": Case("bert_classifier", {"modules_to_save": ["classifier", "score"]}),
    "adapted head": Case("bert_classifier", {"target_modules": ["query", "classifier"]}),
    "all biases and a head": Case("bert_classifier", {"task_type": "SEQ_CLS", "bias": "all"}),
    "distilbert": Case("distilbert", {"target_modules": ["q_lin", "v_lin"]}),
    "gpt2": Case("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "gpt2, not told": Case("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2 all-linear": Case("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2 embedding": Case("gpt2", {"target_modules": ["wte", "wpe"]}),
    "every kind of layer": Case("mixed", {"target_modules": r"table|fc|block\.(fc|conv|line)", "r": 3}),
    "every kind, ranks differ": Case(
        "mixed",
        {
            "target_modules": r"table|fc|block\.(fc|conv|line)",
            "r": 3,
            "rank_pattern": {"^fc": 2, "table": 4, "line": 1},
        },
    ),
    "every kind, bfloat16": Case("mixed", {"target_modules": r"table|fc|block\.(fc|conv|line)"}, torch.bfloat16),
}


@pytest.mark.parametrize("uniform_rank", [True, False], ids=["one rank", "own ranks"])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, uniform_rank: bool, tmp_path: Path) -> None:
    round_trip(CASES[name], tmp_path, uniform_rank=uniform_rank)


PLANTED: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "scale forgotten": ("plain", lambda: mock.patch.object(PeftConfig, "scale_of", lambda *_: 1.0)),
    "rsLoRA ignored": (
        "rslora",
        lambda: mock.patch.object(PeftConfig, "scale_of", lambda self, name: self.alpha / self.rank_of(name)),
    ),
    "alpha_pattern ignored": (
        "alpha_pattern",
        lambda: mock.patch.object(PeftConfig, "scale_of", lambda self, name: self.alpha / self.rank_of(name)),
    ),
    "rank_pattern ignored": ("rank_pattern", lambda: mock.patch.object(PeftConfig, "rank_of", lambda self, _: self.r)),
    "prefix lost": (
        "classifier",
        lambda: mock.patch("share_core.peft.writer.tensor_key", lambda m, p, e: tensor_key(site_of(m), p, e)),
    ),
    "written ranks not given": ("rank_pattern", lambda: _written({"rank_pattern": {}, "alpha_pattern": {}})),
    "written alphas not given": ("rank_pattern", lambda: _written({"alpha_pattern": {}})),
    "written alpha doubled": ("plain", lambda: _written({"lora_alpha": 8})),
    "embedding written like a linear layer": (
        "gpt2 embedding",
        lambda: mock.patch("share_core.peft.writer.tensor_key", lambda m, p, _: tensor_key(m, p, False)),
    ),
}


def _written(change: Mapping[str, Any]) -> AbstractContextManager[Any]:
    whole = share_core.peft.writer._config
    return mock.patch("share_core.peft.writer._config", lambda *arguments: {**whole(*arguments), **change})


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize("bug", PLANTED)
def test_round_trip_catches(bug: str, tmp_path: Path) -> None:
    name, plant = PLANTED[bug]
    # A wrong shape is a RuntimeError of PEFT, a wrong rank an AdapterError of ours.
    with plant(), pytest.raises((AssertionError, AdapterError, RuntimeError)):
        round_trip(CASES[name], tmp_path, uniform_rank=False)


def test_what_is_kept_survives_json(tmp_path: Path) -> None:
    export = read_adapter(make(CASES["every kind, ranks differ"], tmp_path / "a")).export
    assert PeftExport.from_json(json.loads(json.dumps(export.to_json()))) == export


def test_the_written_config(tmp_path: Path) -> None:
    adapter = round_trip(CASES["rank_pattern"], tmp_path, uniform_rank=True)
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (5, 5, {}, False)
    assert config["target_modules"] == sorted(site.module for site in adapter.sites.values())
    shapes = {
        t.shape for k, t in load_file(tmp_path / "written" / "adapter_model.safetensors").items() if "lora_A" in k
    }
    assert shapes == {(5, 16)}


def test_factors_are_written_balanced(tmp_path: Path) -> None:
    round_trip(CASES["rslora"], tmp_path)
    tensors = load_file(tmp_path / "written" / "adapter_model.safetensors")
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            assert_close(a @ a.T, b.T @ b, key)
            assert_close(b.T @ b, torch.diag(torch.diag(b.T @ b)), key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_written_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = read_adapter(make(Case(), tmp_path / "a"))
    write_adapter(tmp_path / "b", adapter.factors, adapter.export, dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {dtype}
    again = read_adapter(tmp_path / "b")
    for name, f in adapter.factors.items():
        apart = difference_norm(f.out, f.in_, again.factors[name].out, again.factors[name].in_)
        assert apart <= 4 * torch.finfo(dtype).eps * product_norm(f.out, f.in_)


def test_a_module_that_only_ends_alike_is_not_adapted(tmp_path: Path) -> None:
    case = Case("mixed", {"target_modules": "fc"})
    assert set(round_trip(case, tmp_path).sites) == {"fc"}
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert config["target_modules"] == "fc", "as a list it would select block.fc and tail.fc too"


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_task_without_its_head_loads(task_type: str | None, tmp_path: Path) -> None:
    case = Case("bert_classifier", {"task_type": task_type, "modules_to_save": ["classifier"]})
    adapter = read_adapter(make(case, tmp_path / "a"))
    assert sorted(adapter.extra) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]
    assert "2 tensors that are no LoRA" in adapter.notes[0]
    write_adapter(tmp_path / "b", adapter.factors, adapter.export)
    assert_reads_as_peft_does(adapter, deltas(load(case, tmp_path / "b")))


def test_one_site_name_in_every_model_class(tmp_path: Path) -> None:
    """The factors of a bare encoder, written like a classifier's adapter, load into the classifier."""
    bare = read_adapter(make(Case(), tmp_path / "bare"))
    classifier = Case("bert_classifier")
    other = read_adapter(make(classifier, tmp_path / "other"))
    assert (bare.prefix, other.prefix) == ("", "bert.")
    assert set(bare.sites) == set(other.sites)
    write_adapter(tmp_path / "moved", bare.factors, other.export)
    found = deltas(load(classifier, tmp_path / "moved"))
    for name, factors in bare.factors.items():
        assert_close(found[f"bert.{name}"], factors.out @ factors.in_.T, name)


@pytest.mark.parametrize(
    ("pattern", "to"),
    [
        (r"(lora_[AB])\.weight", r"\1.default.weight"),
        (r"(lora_[AB])\.weight", r"\1.some-name.weight"),
        (r"base_model\.model\.", ""),
        (r"base_model\.model\.", "base_model.model.bert."),
        (r"base_model\.model\.", "base_model.model.0.auto_model."),
    ],
)
def test_keys_of_other_versions_and_classes(pattern: str, to: str, tmp_path: Path) -> None:
    case = CASES["rslora with patterns"]
    file = make(case, tmp_path / "a") / "adapter_model.safetensors"
    expected = read_adapter(tmp_path / "a")
    save_file({re.sub(pattern, to, key): t for key, t in load_file(file).items()}, file)
    got = read_adapter(tmp_path / "a")
    assert set(got.factors) == set(expected.factors)
    for name, factors in got.factors.items():
        assert torch.equal(factors.out, expected.factors[name].out)
        assert torch.equal(factors.in_, expected.factors[name].in_)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_a_converted_pissa_adapter_is_plain(tmp_path: Path) -> None:
    original = _model("bert")
    model = get_peft_model(_model("bert"), LoraConfig(target_modules=["query"], init_lora_weights="pissa", r=2))
    start = tmp_path / "start"
    config: Any = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(str(start), save_embedding_layers=False)
    config.init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    model.save_pretrained(
        str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(start), save_embedding_layers=False
    )
    adapter = read_adapter(tmp_path / "a")
    merged = model.merge_and_unload().state_dict()
    for name, weight in original.state_dict().items():
        if "query.weight" in name:
            f = adapter.factors[name.removesuffix(".weight")]
            assert f.rank == 4
            assert_close(weight + f.out @ f.in_.T, merged[name], name)
