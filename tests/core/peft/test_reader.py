"""Reading tensors: what is refused, in what words, and what is only noted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from share_core.errors import (
    AdapterError,
    FedshareError,
    HeaderError,
    NonFiniteError,
    TensorNameError,
    TensorShapeError,
    TensorTypeError,
    UnsupportedAdapterError,
)
from share_core.names import check_name
from share_core.peft.reader import PeftSite, read_adapter, task_name

Make = Callable[..., Path]
KEY = "base_model.model.encoder.layer.0.query.lora_{}.weight"
A, B = KEY.format("A"), KEY.format("B")


def test_what_is_read(make_adapter: Make) -> None:
    directory = make_adapter(name="My Task (v2)")
    adapter = read_adapter(directory)
    raw = load_file(directory / "adapter_model.safetensors")
    assert adapter.name == "my-task-v2"
    assert adapter.prefix == ""
    assert adapter.notes == ()
    assert adapter.nbytes == 4 * (2 * 4 + 6 * 2)
    assert adapter.sha256 == hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert adapter.sites == {"encoder.layer.0.query": PeftSite("encoder.layer.0.query", "linear", (6, 4))}
    factors = adapter.factors["encoder.layer.0.query"]
    assert torch.equal(factors.out, 2 * raw[B])
    assert torch.equal(factors.in_, raw[A].T)
    spec = adapter.site_specs["encoder.layer.0.query"]
    assert (spec.d_out, spec.d_in, spec.sha256) == (6, 4, "")


def test_bytes_are_counted_as_stored(make_adapter: Make) -> None:
    tensors = {
        A: torch.ones(2, 4, dtype=torch.bfloat16),
        B: torch.ones(6, 2, dtype=torch.float16),
        "head": torch.ones(9),
    }
    assert read_adapter(make_adapter(tensors=tensors)).nbytes == 2 * (2 * 4 + 6 * 2)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("sst2", "sst2"),
        ("A b/..", None),
        ("..x..", "x"),
        ("___", "adapter"),
        ("x" * 90 + "-1", f"{'x' * 22}--{'x' * 38}-1"),
        ("org_repo__" + "y" * 60 + "_checkpoint-2500", f"org_repo__{'y' * 12}--{'y' * 24}_checkpoint-2500"),
        ("Ünïcode", "n-code"),
    ],
)
def test_a_directory_becomes_a_legal_task_name(name: str, task: str | None) -> None:
    found = task_name(Path("/somewhere") / name)
    assert check_name(found) == found
    assert task in (None, found)


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        ({B: None}, AdapterError, f"tensor '{A}' has no lora_B beside it"),
        ({A: None}, AdapterError, f"tensor '{B}' has no lora_A beside it"),
        (
            {A: None, B: None, "base_model.model.head.weight": torch.ones(2)},
            AdapterError,
            "no LoRA tensor, only base_model",
        ),
        ({A: None, B: None, "x.hada_w1_a": torch.ones(2, 2)}, AdapterError, "no LoRA tensor"),
        ({A: torch.ones(3, 4)}, AdapterError, f"tensor '{A}': expected rank 2 by the config, got 3 of shape (3, 4)"),
        ({B: torch.ones(6, 3)}, AdapterError, f"tensor '{B}': expected rank 2 by the config, got 3 of shape (6, 3)"),
        ({B: torch.ones(6, 2, 1, 1)}, AdapterError, "expected the two factors of a linear, convolution or embedding"),
        ({A: torch.ones(2), B: torch.ones(6)}, AdapterError, "expected the two factors"),
        ({A: torch.ones(2, 4, 3), B: torch.ones(6, 2, 3)}, AdapterError, "expected the two factors"),
        ({A: torch.ones(2, 4, 3), B: torch.ones(6, 1, 1)}, UnsupportedAdapterError, "grouped convolution"),
        ({KEY.format("A").replace("A.", "A.default."): torch.ones(2, 4)}, AdapterError, "are for one module"),
        ({KEY.format("A").replace("A.", "A.other."): torch.ones(2, 4)}, AdapterError, "save one adapter per directory"),
        ({A.removeprefix("base_model.model."): torch.ones(2, 4)}, AdapterError, "are for one module"),
        ({A.replace("lora_A.weight", "lora_embedding_A"): torch.ones(2, 4)}, AdapterError, "are for one module"),
        ({A.replace("encoder", "bert.encoder"): torch.ones(2, 4)}, AdapterError, "has no lora_B beside it"),
        ({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(6)}, UnsupportedAdapterError, "DoRA"),
        ({A.replace("lora_A.weight", "lora_E"): torch.ones(2, 1)}, UnsupportedAdapterError, "AdaLoRA"),
        ({B.replace("weight", "bias"): torch.ones(6)}, UnsupportedAdapterError, "bias inside LoRA (lora_bias)"),
        ({A.replace("lora_A", "lora_velora_embed"): torch.ones(6)}, UnsupportedAdapterError, "no lora_A or lora_B"),
        ({A.replace("query", "q" * 600): torch.ones(2, 4)}, TensorNameError, "a name of 1 to 320 printable ASCII"),
        ({A: torch.full((2, 4), torch.nan)}, NonFiniteError, f"tensor '{A}' holds 8 values that are NaN"),
        ({"head": torch.tensor([torch.inf])}, NonFiniteError, "tensor 'head'"),
        ({B: torch.full((6, 2), 3e38)}, NonFiniteError, f"tensor '{B}' times its scale 2"),
        ({A: torch.ones(2, 4, dtype=torch.float64)}, TensorTypeError, "F64"),
        ({"head": torch.ones(3, dtype=torch.int64)}, TensorTypeError, "I64"),
        ({A: torch.ones(2, 0)}, TensorShapeError, A),
        ({A: torch.ones(2, 4, 1, 1, 1)}, TensorShapeError, "1 to 4 positive dimensions"),
    ],
)
def test_tensors_that_are_refused(
    make_adapter: Make, tensors: dict[str, Tensor | None], error: type[FedshareError], says: str
) -> None:
    directory = make_adapter(tensors=tensors)
    with pytest.raises(error) as refused:
        read_adapter(directory)
    assert type(refused.value) is error
    assert says in str(refused.value)
    assert str(directory / "adapter_model.safetensors") in str(refused.value)


def test_two_modules_of_one_site(make_adapter: Make) -> None:
    both = {k.replace("encoder", "bert.encoder"): t for k, t in {A: torch.ones(2, 4), B: torch.ones(6, 2)}.items()}
    with pytest.raises(AdapterError, match=r"'bert\.encoder\.layer\.0\.query' and 'encoder\.layer\.0\.query' are both"):
        read_adapter(make_adapter(tensors=both))


@pytest.mark.parametrize(
    ("payload", "error", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", AdapterError, "run 'git lfs pull'"),
        (b"", HeaderError, "at least 8 bytes"),
        (b"PK\x03\x04" + b"\0" * 100, HeaderError, "announced"),
        (b"\x02\0\0\0\0\0\0\0{}", AdapterError, "only nothing"),
    ],
)
def test_files_that_are_refused(make_adapter: Make, payload: bytes, error: type[FedshareError], says: str) -> None:
    directory = make_adapter()
    (directory / "adapter_model.safetensors").write_bytes(payload)
    with pytest.raises(error, match=says):
        read_adapter(directory)


def test_a_missing_file_and_a_pickle(make_adapter: Make) -> None:
    directory = make_adapter()
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        read_adapter(directory)
    (directory / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(UnsupportedAdapterError, match=r"adapter_model\.bin, a pickle, .*safe_serialization=True"):
        read_adapter(directory)
    (directory / "adapter_model.safetensors").mkdir()
    with pytest.raises(AdapterError, match="cannot read"):
        read_adapter(directory)


def test_a_pickle_beside_is_not_read(make_adapter: Make) -> None:
    directory = make_adapter()
    (directory / "adapter_model.bin").write_bytes(b"never opened")
    assert len(read_adapter(directory).factors) == 1


@pytest.mark.parametrize(
    ("config", "tensors", "note"),
    [
        ({}, {B: torch.zeros(6, 2)}, "all B are zero: this adapter changes nothing"),
        ({"lora_alpha": 0}, {}, "all B are zero"),
        ({"target_modules": ["query", "q_proj"]}, {}, "target 'q_proj' matches no tensor"),
        ({"target_modules": ["uery"]}, {}, "target 'uery' matches no tensor"),
        ({"bias": "all"}, {"base_model.model.x.bias": torch.ones(2)}, "trained biases (bias='all') are kept aside"),
        ({}, {"base_model.model.x.bias": torch.ones(2)}, "1 tensors that are no LoRA are kept aside"),
        (
            {},
            {A.replace("0", "1"): torch.ones(2, 4), B.replace("0", "1"): torch.zeros(6, 2)},
            "1 of 2 sites do not change anything: encoder.layer.1.query",
        ),
    ],
)
def test_notes(make_adapter: Make, config: dict[str, Any], tensors: dict[str, Tensor], note: str) -> None:
    notes = read_adapter(make_adapter(config, tensors)).notes
    assert len(notes) == 1
    assert note in notes[0]


class Layers(nn.Module):
    """What PEFT adapts in ways that are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.query = nn.Linear(4, 4)
        self.table = nn.Embedding(6, 4)


BIAS_WARNING = (
    r"ignore:Adapter 'default'. 1 LoRA tensor\(s\) have invalid shape. .*lora_B.bias:peft.utils.warning.PeftWarning"
)
"""PEFT takes the bias inside LoRA, which it wrote itself, for a shard."""


@pytest.mark.filterwarnings(BIAS_WARNING)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (peft.LoraConfig(target_modules=["query"], use_dora=True), "use_dora is not supported: DoRA"),
        (peft.LoraConfig(target_modules=["query"], lora_bias=True), "lora_bias is not supported"),
        (peft.LoraConfig(target_modules=["attention"]), "wraps twice (MultiheadAttention)"),
        (peft.LoraConfig(target_modules=["grouped"]), "grouped convolution"),
        (peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa", r=2), "relative to a changed backbone"),
        (peft.LoraConfig(target_modules=["query"], init_lora_weights="olora", r=2), "relative to a changed backbone"),
        (
            peft.LoraConfig(target_modules=["query"], trainable_token_indices={"table": [1]}),
            "trainable_token_indices is not supported",
        ),
        (peft.LoraConfig(target_parameters=["query.weight"]), "target_parameters is not supported"),
        (peft.AdaLoraConfig(target_modules=["query"], total_step=10), "AdaLoRA keeps singular values in lora_E"),
        (peft.LoHaConfig(target_modules=["query"]), "LoHa is an elementwise product"),
        (peft.LoKrConfig(target_modules=["query"]), "LoKr is a Kronecker product"),
        (peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "it scales activations"),
        (peft.VeraConfig(target_modules=["query"]), "frozen vectors"),
        (peft.OFTConfig(target_modules=["query"], r=2, oft_block_size=0), "rotation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_peft_itself_writes_of_other_kinds_is_refused(config: peft.PeftConfig, says: str, tmp_path: Path) -> None:
    get_peft_model(Layers(), config).save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    with pytest.raises(UnsupportedAdapterError) as refused:
        read_adapter(tmp_path / "a")
    assert says in str(refused.value)


@pytest.mark.filterwarnings(BIAS_WARNING)
@pytest.mark.parametrize(("flag", "says"), [("use_dora", "belongs to DoRA"), ("lora_bias", "a bias inside LoRA")])
def test_a_config_that_hides_its_kind(flag: str, says: str, tmp_path: Path) -> None:
    """The tensors say it too."""
    config = peft.LoraConfig(target_modules=["query"])
    setattr(config, flag, True)
    get_peft_model(Layers(), config).save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), flag: False}))
    with pytest.raises(UnsupportedAdapterError, match=says):
        read_adapter(tmp_path / "a")


def test_the_file_is_not_changed(make_adapter: Make) -> None:
    directory = make_adapter()
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    adapter = read_adapter(directory)
    adapter.factors["encoder.layer.0.query"].out.zero_()
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    save_file({"x": torch.ones(1)}, directory / "other.safetensors")
    assert read_adapter(directory).sha256 == adapter.sha256
