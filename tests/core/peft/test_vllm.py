"""vLLM's rules for adapter directories, each with an example that breaks it and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from share_core.errors import AdapterError, UnsupportedAdapterError
from share_core.peft import vllm
from share_core.peft.export import PeftExport, PeftSite
from share_core.peft.vllm import MAX_RANKS, check_vllm
from share_core.peft.writer import write_adapter
from share_core.types import Factors

A = "base_model.model.encoder.layer.0.query.lora_A.weight"
B = "base_model.model.encoder.layer.0.query.lora_B.weight"
OTHER = {
    "base_model.model.encoder.layer.0.value.lora_A.weight": torch.ones(3, 4),
    "base_model.model.encoder.layer.0.value.lora_B.weight": torch.ones(6, 3),
}
"""A second module, of rank 3."""


def test_what_is_exported_is_served(make_adapter: Any, tmp_path: Path) -> None:
    assert check_vllm(make_adapter()) == 8
    assert check_vllm(make_adapter({"use_rslora": True}, name="rs"), {"query", "value"}) == 8
    like = PeftExport(None, "SEQ_CLS", False, ("classifier",), {
        "query": PeftSite("bert.query", "linear", (6, 4)), "value": PeftSite("bert.value", "linear", (40, 30)),
    })  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    factors = {
        "query": Factors(torch.randn(6, 2, generator=draw), torch.randn(4, 2, generator=draw)),
        "value": Factors(torch.randn(40, 17, generator=draw), torch.randn(30, 17, generator=draw)),
    }
    write_adapter(tmp_path / "out", factors, like)
    assert check_vllm(tmp_path / "out") == 32
    write_adapter(tmp_path / "own", factors, like, uniform_rank=False)
    assert check_vllm(tmp_path / "own") == 32  # alpha follows the rank, so that all scales are 1


@pytest.mark.parametrize("rank", [1, 8, 9, 256, 257, 321, 512])
def test_the_smallest_limit_that_holds_the_rank(rank: int, make_adapter: Any) -> None:
    tensors = {A: torch.ones(rank, 4), B: torch.ones(6, rank)}
    limit = check_vllm(make_adapter({"r": rank, "lora_alpha": rank}, tensors))
    assert limit in MAX_RANKS
    assert limit >= rank
    assert not [smaller for smaller in MAX_RANKS if rank <= smaller < limit]


ABSENT = "left out"
CONVOLUTION = {"c.lora_A.weight": torch.ones(2, 4, 1, 1), "c.lora_B.weight": torch.ones(3, 2, 1, 1)}
EMBEDDING = {"e.lora_embedding_A": torch.ones(2, 9), "e.lora_embedding_B": torch.ones(3, 2)}
BROKEN: list[tuple[str, Mapping[str, Any], Mapping[str, Any], str]] = [
    ("r", {"r": ABSENT}, {A: torch.ones(8, 4), B: torch.ones(6, 8)}, "has no r"),
    ("alpha", {"lora_alpha": ABSENT}, {}, "has no lora_alpha"),
    ("targets", {"target_modules": ABSENT}, {}, "has no target_modules"),
    ("rank", {"r": 513}, {A: torch.ones(513, 4), B: torch.ones(6, 513)}, "its rank is 513, at most 512"),
    ("ranks", {"rank_pattern": {"value": 3}, "alpha_pattern": {"value": 6}}, OTHER, "a module has rank 3, r is 2"),
    ("scales", {"r": 3, "rank_pattern": {"query": 2}}, OTHER, "has scale 2 by its patterns, .* 1.33333 would be used"),
    ("head", {"modules_to_save": ["classifier"]}, {}, "modules_to_save is classifier"),
    ("bias", {"bias": "all"}, {}, "bias is 'all'"),
    ("named", {}, {A: None, A.replace("_A", "_A.default"): torch.ones(2, 4)}, r"'.*_A.default.weight' has another"),
    ("prefix", {}, {A: None, A.removeprefix("base_model.model."): torch.ones(2, 4)}, "'encoder.* has another name"),
    ("extra", {}, {"base_model.model.score.weight": torch.ones(2, 2)}, "'base_model.model.score.weight' has another"),
    ("convolution", {}, {f"base_model.model.{key}": t for key, t in CONVOLUTION.items()}, "'c' is of kind conv"),
    ("embedding", {}, {f"base_model.model.{key}": t for key, t in EMBEDDING.items()}, "'e' is of kind embedding"),
]  # fmt: skip


@pytest.fixture
def make_broken(make_adapter: Callable[..., Path]) -> Callable[..., Path]:
    """Return a maker of adapters whose config may also lack a key."""

    def make(config: Mapping[str, Any], tensors: Mapping[str, Any], name: str) -> Path:
        directory = make_adapter({key: v for key, v in config.items() if v != ABSENT}, tensors, name)
        path = directory / "adapter_config.json"
        raw = json.loads(path.read_text())
        path.write_text(json.dumps({key: v for key, v in raw.items() if config.get(key) != ABSENT}))
        return directory

    return make


@pytest.mark.parametrize(("config", "tensors", "why"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_every_rule_has_an_example_that_breaks_it_alone(
    config: Mapping[str, Any], tensors: Mapping[str, Any], why: str, make_broken: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedAdapterError, match=why) as refusal:
        check_vllm(make_broken(config, tensors, "task"))
    assert ";" not in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "rules"),
    [("_of_config", 4), ("_of_modules", 3), ("_of_tensors", 3), ("_REQUIRED", 3)],
)
def test_the_examples_would_show_a_rule_that_is_gone(
    part: str, rules: int, make_broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, part, () if part == "_REQUIRED" else lambda *_: ())
    passed = 0
    for name, config, tensors, _ in BROKEN:
        try:
            check_vllm(make_broken(config, tensors, name))
        except (UnsupportedAdapterError, StopIteration):
            continue
        passed += 1
    assert passed == rules - (part == "_of_config")  # a rank of 513 finds no limit either way


def test_several_broken_rules_are_told_at_once(make_adapter: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"modules_to_save is head.*; bias is 'all'.*; module .* q_proj"):
        check_vllm(make_adapter({"modules_to_save": ["head"], "bias": "all"}), {"q_proj"})


def test_dora_and_an_incomplete_directory_are_refused_by_the_reader(make_adapter: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match="use_dora is not supported"):
        check_vllm(make_adapter({"use_dora": True}))
    directory = make_adapter(name="half")
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({A: tensors[A]}, directory / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="no lora_B beside it"):
        check_vllm(directory)
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 2
