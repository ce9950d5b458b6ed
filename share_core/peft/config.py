"""What an ``adapter_config.json`` says.

PEFT applies ``dW = scale * B A`` with ``scale = alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA (Kalajdzievski, 2023).
``rank_pattern`` and ``alpha_pattern`` change r and alpha of the modules that a pattern matches, see
:mod:`share_core.peft.patterns`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from share_core.errors import AdapterError
from share_core.peft.kinds import refuse_unsupported
from share_core.peft.patterns import check_pattern, first_match

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 4 << 20
_MAX_ALPHA = 1e6
_MAX_RANK = 1 << 20
_BIAS = ("none", "all", "lora_only")
_T = TypeVar("_T")


@dataclass(frozen=True)
class PeftConfig:
    """The part of a LoRA config that decides what the tensors mean, and what a written adapter repeats."""

    r: int
    """Rank of modules that no pattern matches."""
    alpha: float
    """Likewise ``lora_alpha``."""
    use_rslora: bool
    fan_in_fan_out: bool
    """Weights are stored as (d_in, d_out), as GPT-2's Conv1D does."""
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str | None
    """A list of names, a regular expression, or ``all-linear``. Never matched here: the tensors say what is adapted."""
    modules_to_save: tuple[str, ...]
    bias: str
    """``none``, ``all`` or ``lora_only``: which biases were trained."""
    base_model: str | None
    """``base_model_name_or_path``."""
    task_type: str | None
    other: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Every other key, as it was read."""

    def rank_of(self, module: str) -> int:
        """Return the rank that PEFT gives a module."""
        pattern = first_match(self.rank_pattern, module)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def scale_of(self, module: str) -> float:
        """Return what PEFT multiplies ``B A`` of a module with."""
        rank, pattern = self.rank_of(module), first_match(self.alpha_pattern, module)
        alpha = self.alpha if pattern is None else self.alpha_pattern[pattern]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


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
            raise AdapterError(f"{path} has {path.stat().st_size} bytes, at most {_MAX_CONFIG_BYTES} are read")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{directory} has no {CONFIG_FILE}: give the directory that PEFT's save_pretrained wrote"
        ) from None
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {str(error)[:120]}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: expected an object, got {_shown(raw)}")
    refuse_unsupported(raw, str(path))
    return _parse(raw, str(path))


_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "target_modules",
    "modules_to_save", "bias", "base_model_name_or_path", "task_type",
}  # fmt: skip


def _parse(raw: Mapping[str, Any], where: str) -> PeftConfig:
    bias = raw.get("bias", "none")
    if bias not in _BIAS:
        raise AdapterError(f"{where}: bias: expected one of {', '.join(_BIAS)}, got {_shown(bias)}")
    return PeftConfig(
        r=_rank(raw.get("r", 8), f"{where}: r"),
        alpha=_alpha(raw.get("lora_alpha", 8), f"{where}: lora_alpha"),
        use_rslora=_flag(raw.get("use_rslora"), f"{where}: use_rslora"),
        fan_in_fan_out=_flag(raw.get("fan_in_fan_out"), f"{where}: fan_in_fan_out"),
        rank_pattern=_patterns(raw.get("rank_pattern"), f"{where}: rank_pattern", _rank),
        alpha_pattern=_patterns(raw.get("alpha_pattern"), f"{where}: alpha_pattern", _alpha),
        target_modules=_targets(raw.get("target_modules"), f"{where}: target_modules"),
        modules_to_save=_names(raw.get("modules_to_save"), f"{where}: modules_to_save"),
        bias=bias,
        base_model=_text(raw.get("base_model_name_or_path"), f"{where}: base_model_name_or_path"),
        task_type=_text(raw.get("task_type"), f"{where}: task_type"),
        other=MappingProxyType({key: value for key, value in raw.items() if key not in _READ}),
    )


def _rank(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise AdapterError(f"{what}: expected a whole number of at least 1, got {_shown(value)}")
    return value


def _alpha(value: Any, what: str) -> float:
    # Comparisons are false for NaN, and unlike float() they do not overflow for a whole number of 400 digits.
    if type(value) not in (int, float) or not -_MAX_ALPHA <= value <= _MAX_ALPHA:
        raise AdapterError(f"{what}: expected a number within {_MAX_ALPHA:g}, got {_shown(value)}")
    return float(value)


def _flag(value: Any, what: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{what}: expected true or false, got {_shown(value)}")
    return bool(value)


def _patterns(value: Any, what: str, read: Callable[[Any, str], _T]) -> Mapping[str, _T]:
    if value is None:
        return MappingProxyType({})
    if not isinstance(value, dict):
        raise AdapterError(f"{what}: expected an object of module patterns, got {_shown(value)}")
    for pattern in value:
        try:
            check_pattern(pattern)
        except ValueError as error:
            raise AdapterError(f"{what}: pattern {_shown(pattern)} cannot be used: {error}") from None
    return MappingProxyType({pattern: read(v, f"{what} {_shown(pattern)}") for pattern, v in value.items()})


def _targets(value: Any, what: str) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    return _names(value, what)


def _names(value: Any, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{what}: expected a list of module names, got {_shown(value)}")
    return tuple(value)


def _text(value: Any, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"{what}: expected text or null, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
