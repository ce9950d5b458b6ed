"""adapter_config.json: what each value means, and every refusal of a value, a file or a kind by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils.peft_types import PeftType

from share_core.errors import AdapterError, UnsupportedAdapterError
from share_core.peft.config import read_config
from share_core.peft.kinds import _HARMLESS, _OPTIONS

Make = Callable[..., Path]


def test_defaults_are_those_of_peft(make_adapter: Make) -> None:
    directory = make_adapter()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    config, theirs = read_config(directory), LoraConfig()
    assert (config.r, config.alpha, config.bias) == (theirs.r, theirs.lora_alpha, theirs.bias)
    assert (config.use_rslora, config.fan_in_fan_out) == (theirs.use_rslora, theirs.fan_in_fan_out)


def test_every_option_of_this_peft_release_was_considered() -> None:
    """A new ``use_...`` or ``..._config`` of LoRA must be looked at, not passed over."""
    options = {f.name for f in fields(LoraConfig) if f.name.startswith("use_") or f.name.endswith("_config")}
    assert options <= {*_OPTIONS, *_HARMLESS}


def test_scale(make_adapter: Make) -> None:
    patterns = {"rank_pattern": {"value": 9}, "alpha_pattern": {"query": 3.5}}
    plain = read_config(make_adapter({"r": 4, "lora_alpha": 6, **patterns}, name="plain"))
    assert [plain.rank_of(m) for m in ("x.key", "x.value")] == [4, 9]
    assert [plain.scale_of(m) for m in ("x.key", "x.value", "x.query")] == [6 / 4, 6 / 9, 3.5 / 4]
    stable = read_config(make_adapter({"r": 4, "lora_alpha": 6, "use_rslora": True, **patterns}, name="stable"))
    assert [stable.scale_of(m) for m in ("key", "value", "query")] == [6 / 2, 6 / 3, 3.5 / 2]


def test_unknown_harmless_keys_are_kept(make_adapter: Make) -> None:
    config = read_config(make_adapter({"peft_version": "9.9", "layers_to_transform": [1], "revision": None}))
    assert dict(config.other) == {"peft_version": "9.9", "layers_to_transform": [1], "revision": None}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(["a", "b"], ("a", "b")), ("all-linear", "all-linear"), (".*query", ".*query"), (None, None)],
)
def test_targets(make_adapter: Make, value: Any, expected: Any) -> None:
    assert read_config(make_adapter({"target_modules": value})).target_modules == expected


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("r", "8", "whole number of at least 1"),
        ("r", 0, "whole number of at least 1"),
        ("r", -1, "got -1"),
        ("r", True, "got true"),
        ("r", 2.0, "got 2.0"),
        ("r", None, "got null"),
        ("lora_alpha", math.nan, "got NaN"),
        ("lora_alpha", math.inf, "got Infinity"),
        ("lora_alpha", 10**400, "expected a number"),
        ("lora_alpha", "16", "expected a number"),
        ("lora_alpha", False, "expected a number"),
        ("use_rslora", "yes", "true or false"),
        ("fan_in_fan_out", 1, "true or false"),
        ("bias", "some", "none, all, lora_only"),
        ("bias", ["all"], "none, all, lora_only"),
        ("rank_pattern", ["query"], "object of module patterns"),
        ("rank_pattern", {"query": 0}, "whole number"),
        ("rank_pattern", {"query": "8"}, "whole number"),
        ("rank_pattern", {"(": 8}, "no regular expression"),
        ("rank_pattern", {"a" * 513: 8}, "at most 512"),
        ("rank_pattern", {"(?=a)a": 8}, "lookaround"),
        ("alpha_pattern", {"query": math.nan}, "expected a number"),
        ("alpha_pattern", "query", "object of module patterns"),
        ("target_modules", 3, "list of module names"),
        ("target_modules", ["a", 1], "list of module names"),
        ("modules_to_save", "classifier", "list of module names"),
        ("base_model_name_or_path", 3, "text or null"),
        ("task_type", [], "text or null"),
    ],
)
def test_a_value_that_cannot_be(make_adapter: Make, key: str, value: Any, says: str) -> None:
    directory = make_adapter({key: value})
    with pytest.raises(AdapterError) as refused:
        read_config(directory)
    message = str(refused.value)
    assert says in message
    assert str(directory / "adapter_config.json") in message
    assert f" {key}" in message
    assert len(message) < 400


@pytest.mark.parametrize("kind", sorted(set(PeftType) - {PeftType.LORA}))
def test_every_other_peft_type_is_refused_by_name(make_adapter: Make, kind: PeftType) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"peft_type is '{kind.value}', only LORA .*train a plain LoRA"):
        read_config(make_adapter({"peft_type": kind.value}))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("ADALORA", "multiply lora_E into lora_A"),
        ("LOHA", "peft.save_as_lora"),
        ("LOKR", "Kronecker"),
        ("IA3", "scales activations"),
        ("VERA", "frozen"),
        ("OFT", "rotation"),
        ("XLORA", "one by one"),
        ("PREFIX_TUNING", "virtual tokens"),
        ("SOMETHING_NEW", "not known"),
        (None, "'None'"),
        (["LORA"], "LORA"),
    ],
)
def test_refused_kinds_say_why(make_adapter: Make, kind: Any, says: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=says):
        read_config(make_adapter({"peft_type": kind}))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "bias inside LoRA"),
        ("layer_replication", [[0, 2], [1, 3]], "repeats layers"),
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("use_qalora", True, "QA-LoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("target_parameters", ["experts.weight"], "bare parameters"),
        ("trainable_token_indices", [1], "rows of the embedding"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("monteclora_config", {"a": 1}, "MonteCLoRA"),
        ("velora_config", {"a": 1}, "VeLoRA"),
        ("kasa_config", {"a": 1}, "KaSA"),
        ("use_future", True, "unknown here"),
        ("future_config", {"a": 1}, "unknown here"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "quantised backbone"),
        ("init_lora_weights", "something new", "unknown here"),
    ],
)
def test_relatives_of_lora_are_refused_by_name(make_adapter: Make, key: str, value: Any, says: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as refused:
        read_config(make_adapter({key: value}))
    assert key in str(refused.value)
    assert says in str(refused.value)


@pytest.mark.parametrize("value", [None, False, {}, []])
@pytest.mark.parametrize("key", [*_OPTIONS, "use_future", "future_config"])
def test_options_that_are_off_do_not_matter(make_adapter: Make, key: str, value: Any) -> None:
    assert read_config(make_adapter({key: value})).r == 2


@pytest.mark.parametrize("init", [True, False, None, "true", "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_backbone_alone(make_adapter: Make, init: Any) -> None:
    assert read_config(make_adapter({"init_lora_weights": init})).r == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "expected an object"),
        (b'"LORA"', "expected an object"),
        (b" " * (5 << 20), "at most"),
    ],
)
def test_a_config_that_is_none(make_adapter: Make, text: bytes, says: str) -> None:
    directory = make_adapter()
    (directory / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError, match=says):
        read_config(directory)


def test_a_directory_that_is_none(make_adapter: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not a directory"):
        read_config(tmp_path / "nothing")
    directory = make_adapter()
    (directory / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_config.json: give the directory"):
        read_config(directory)
    (directory / "adapter_config.json").mkdir()
    with pytest.raises(AdapterError, match="cannot read"):
        read_config(directory)


def test_the_conftest_config_is_accepted(make_adapter: Make) -> None:
    """Every refusal above is due to the one key it changes."""
    config = read_config(make_adapter())
    assert json.loads(json.dumps(config.target_modules)) == ["query"]
