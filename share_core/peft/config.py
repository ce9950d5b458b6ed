"""What an ``adapter_config.json`` says, and which adapters are refused because of it.

PEFT applies ``dW = scale * B A`` with ``scale = alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA (Kalajdzievski, 2023).
``rank_pattern`` and ``alpha_pattern`` change r and alpha of the modules whose name a pattern matches as a dotted
suffix; the first pattern that matches counts, as in ``peft.utils.other.get_pattern_key``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_core.errors import AdapterError, UnsupportedAdapterError

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 4 << 20
_MAX_PATTERN = 512
_NESTED_QUANTIFIER = re.compile(r"\)\s*[*+{]")

_UNSUPPORTED_FLAGS = {
    "use_dora": "DoRA rescales whole columns, which is no low-rank change",
    "lora_bias": "it trains a bias inside LoRA",
    "layer_replication": "it repeats layers of the backbone",
    "alora_invocation_tokens": "activated LoRA changes only some tokens",
    "use_qalora": "QA-LoRA pools the inputs before A",
    "use_bdlora": "block-diagonal LoRA has another layout",
    "target_parameters": "it adapts bare parameters, which have no module name",
    "trainable_token_indices": "it trains single rows of the embedding",
    "megatron_config": "Megatron splits its layers over processes",
    "arrow_config": "Arrow routes between adapters",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA changes the forward pass",
    "kasa_config": "KaSA changes the backbone's own weights",
}
"""Options of a LoRA config that make it something else than ``W + scale B A``, with the reason."""

_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract something from the backbone's weights: the saved factors are relative to that."""


@dataclass(frozen=True)
class PeftConfig:
    """The part of a LoRA config that decides what the tensors mean, and what a written adapter repeats."""

    r: int
    alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str | None
    """A list of names, a regular expression, or ``all-linear``."""
    modules_to_save: tuple[str, ...]
    bias: str
    base_model: str | None
    task_type: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank that PEFT gives a module."""
        return int(self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r))

    def scale_of(self, module: str) -> float:
        """Return what PEFT multiplies ``B A`` of a module with."""
        rank = self.rank_of(module)
        alpha = float(self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def read_config(directory: Path) -> PeftConfig:
    """Read and check the config of an adapter directory.

    Raises:
        AdapterError: if there is none, or if a value cannot be; names key, expected and got.
        UnsupportedAdapterError: if it describes something else than plain LoRA; names it and says what to do.
    """
    path = directory / CONFIG_FILE
    if not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory: give the one that PEFT's save_pretrained wrote")
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterError(f"{path} has {path.stat().st_size} bytes: no {CONFIG_FILE} is that large")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{directory} has no {CONFIG_FILE}: give the directory that PEFT's save_pretrained wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {str(error)[:120]}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: expected an object, got {type(raw).__name__}")
    _refuse_unsupported(raw, path)
    return _parse(raw, path)


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"{path}: peft_type is {str(kind)[:40]!r}; only LORA can be merged: train a plain LoRA adapter instead"
        )
    for flag, why in _UNSUPPORTED_FLAGS.items():
        if raw.get(flag):
            raise UnsupportedAdapterError(
                f"{path}: {flag} is set and not supported, because {why}: train a plain LoRA adapter without it"
            )
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CONVERTIBLE_INITS):
        raise UnsupportedAdapterError(
            f"{path}: init_lora_weights is {init[:40]!r}: these factors are relative to a changed backbone; save the "
            "adapter again with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a "
            "plain LoRA"
        )


def _parse(raw: Mapping[str, Any], path: Path) -> PeftConfig:
    alpha = raw.get("lora_alpha", 8)
    if not _is_number(alpha):
        raise AdapterError(f"{path}: lora_alpha: expected a finite number, got {str(alpha)[:40]!r}")
    bias = raw.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"{path}: bias: expected none, all or lora_only, got {str(bias)[:40]!r}")
    return PeftConfig(
        r=_rank(raw.get("r", 8), f"{path}: r"),
        alpha=float(alpha),
        use_rslora=_flag(raw, "use_rslora", path),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", path),
        rank_pattern={key: _rank(v, f"{path}: rank_pattern {key!r}") for key, v in _patterns(raw, "rank_pattern", path)},
        alpha_pattern={key: _alpha(v, f"{path}: alpha_pattern {key!r}") for key, v in _patterns(raw, "alpha_pattern", path)},
        target_modules=_targets(raw.get("target_modules"), path),
        modules_to_save=_names(raw.get("modules_to_save"), f"{path}: modules_to_save"),
        bias=bias,
        base_model=_text(raw.get("base_model_name_or_path"), f"{path}: base_model_name_or_path"),
        task_type=_text(raw.get("task_type"), f"{path}: task_type"),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: Any, what: str) -> int:
    if type(value) is not int or value < 1:
        raise AdapterError(f"{what}: expected a whole number of at least 1, got {str(value)[:40]!r}")
    return value


def _alpha(value: Any, what: str) -> float:
    if not _is_number(value):
        raise AdapterError(f"{what}: expected a finite number, got {str(value)[:40]!r}")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool) and value is not None:
        raise AdapterError(f"{path}: {key}: expected true or false, got {str(value)[:40]!r}")
    return bool(value)


def _patterns(raw: Mapping[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: {key}: expected an object of module patterns, got {type(value).__name__}")
    for pattern in value:
        if len(pattern) > _MAX_PATTERN or _NESTED_QUANTIFIER.search(pattern):
            raise AdapterError(f"{path}: {key}: pattern {pattern[:60]!r} is too long or repeats a group: write it out")
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{path}: {key}: {pattern[:60]!r} is no regular expression: {error}") from None
    return list(value.items())


def _targets(value: Any, path: Path) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    return _names(value, f"{path}: target_modules")


def _names(value: Any, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{what}: expected a list of module names, got {str(value)[:60]!r}")
    return tuple(value)


def _text(value: Any, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"{what}: expected text or null, got {type(value).__name__}")
    return value
