"""What is kept of an adapter so that its task can be written as a PEFT adapter again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from share_core.errors import AdapterError

KINDS = ("linear", "conv1d_transposed", "conv", "embedding")


@dataclass(frozen=True)
class PeftSite:
    """How one adapted weight is stored in the model."""

    module: str
    """Module path in the model the adapter was trained in; the site's name is its path in the bare model."""
    kind: str
    """``linear``; ``conv1d_transposed`` for GPT-2's Conv1D; ``conv`` for Conv1d and Conv2d; ``embedding``."""
    weight_shape: tuple[int, ...]
    """Of the weight: linear (d_out, d_in); conv1d_transposed (d_in, d_out); conv (out, in, *kernel); embedding (number,
    dim)."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """d_out, d_in of ``B A``: an embedding is dim x number, a convolution out x (in * kernel)."""
        first, *rest = self.weight_shape
        return (rest[0], first) if self.kind in ("embedding", "conv1d_transposed") else (first, math.prod(rest))


@dataclass(frozen=True)
class PeftExport:
    """The frame around a task's factors."""

    base_model: str | None
    task_type: str | None
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    """Heads the adapter had; written again only with their tensors."""
    sites: Mapping[str, PeftSite]
    bias: str = "none"
    """Which biases were trained; written again only with their tensors."""

    @property
    def prefix(self) -> str:
        """What stands before most sites' names in the model, with its dot: ``bert.``, or nothing.

        A head has no prefix, so single sites may differ: :attr:`PeftSite.module` is exact.
        """
        prefixes = Counter(site.module.removesuffix(name) for name, site in self.sites.items())
        return prefixes.most_common(1)[0][0] if prefixes else ""

    def module_of(self, site: str) -> str:
        """Return the path of a site in this adapter's model, also of one that the adapter has not."""
        return self.sites[site].module if site in self.sites else f"{self.prefix}{site}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "base_model": self.base_model,
            "task_type": self.task_type,
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": list(self.modules_to_save),
            "bias": self.bias,
            "sites": {name: [s.module, s.kind, list(s.weight_shape)] for name, s in sorted(self.sites.items())},
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> PeftExport:
        """Read what :meth:`to_json` gave.

        Raises:
            AdapterError: if it is something else; names the key.
        """
        if not isinstance(raw, Mapping):
            raise _damaged("it is no object")
        sites, heads = raw.get("sites"), raw.get("modules_to_save")
        if not isinstance(sites, Mapping):
            raise _damaged("sites is no object")
        if not isinstance(heads, list) or not all(isinstance(head, str) for head in heads):
            raise _damaged("modules_to_save is no list of names")
        if raw.get("fan_in_fan_out") not in (True, False) or raw.get("bias", "none") not in (
            "none",
            "all",
            "lora_only",
        ):
            raise _damaged("fan_in_fan_out or bias has a value it cannot have")
        return PeftExport(
            base_model=_text(raw, "base_model"),
            task_type=_text(raw, "task_type"),
            fan_in_fan_out=bool(raw["fan_in_fan_out"]),
            modules_to_save=tuple(heads),
            sites={str(name): _site(str(name), value) for name, value in sites.items()},
            bias=raw.get("bias", "none"),
        )


def _site(name: str, raw: Any) -> PeftSite:
    if not isinstance(raw, list | tuple) or len(raw) != 3:
        raise _damaged(f"site {name!r} is not [module, kind, shape]")
    module, kind, shape = raw
    dimensions = (3, 4) if kind == "conv" else (2,)
    if not isinstance(module, str) or not module or kind not in KINDS:
        raise _damaged(f"site {name!r} has module {str(module)[:60]!r} and kind {str(kind)[:60]!r}")
    if not isinstance(shape, list | tuple) or len(shape) not in dimensions:
        raise _damaged(f"site {name!r} has shape {str(shape)[:60]}")
    if not all(type(n) is int and n > 0 for n in shape):
        raise _damaged(f"site {name!r} has shape {str(shape)[:60]}")
    return PeftSite(module, kind, tuple(shape))


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise _damaged(f"{key} is neither text nor null")
    return value


def _damaged(what: str) -> AdapterError:
    return AdapterError(f"the export information is damaged, {what}: read the adapter again")
