"""The families of backbones, each in a file of its own, which is imported when it is needed."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from share_client.backbone_config import PACKAGED, RESNETS, BackboneConfig, is_import_path
from share_client.backbones.backbone import Backbone
from share_core.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Backbones that are loaded in one way."""

    takes: Callable[[str], bool]
    """Whether a ``model`` is of this family."""
    module: str
    """Module with ``load(config, device) -> Backbone``."""
    keys: frozenset[str]
    """Which of ``weights``, ``sites``, ``quantised`` and ``image`` mean something here."""


_HERE = "share_client.backbones"
_LOADING = threading.RLock()
"""Held while a backbone is loaded: transformers sets defaults of the process meanwhile. Factories may load others."""
_MODULE_KEYS = frozenset({"weights", "sites", "image"})
FAMILIES = (
    Family(lambda model: model == "digits-vit", f"{_HERE}.digits_vit", frozenset({"sites"})),
    Family(lambda model: model in RESNETS, f"{_HERE}.resnet", _MODULE_KEYS),
    Family(lambda model: model.startswith("timm:"), f"{_HERE}.timm_models", _MODULE_KEYS),
    Family(is_import_path, f"{_HERE}.imported", _MODULE_KEYS),
    Family(
        lambda model: model not in PACKAGED and is_diffusion(Path(model)),
        f"{_HERE}.diffusion",
        frozenset({"sites"}),
    ),
    Family(lambda model: True, f"{_HERE}.huggingface", frozenset({"sites", "quantised", "image"})),
)
"""The first that takes a model loads it."""


def is_diffusion(directory: Path) -> bool:
    """Return whether a directory is a pipeline of diffusers."""
    return (directory / "model_index.json").is_file()


def load_backbone(model: str | BackboneConfig, device: str = "auto") -> Backbone:
    """Load a backbone; nothing is ever downloaded.

    Args:
        model: what ``backbone`` in ``tasks.toml`` says, see :mod:`share_client.backbone_config`.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.

    Raises:
        ConfigError: unknown name, unreadable weights, missing package, no sites found, or a key that means nothing for
            this model.
    """
    config = BackboneConfig(model) if isinstance(model, str) else model
    family = next(one for one in FAMILIES if one.takes(config.model))
    for key in ("weights", "sites", "quantised", "image"):
        if getattr(config, key) is not None and key not in family.keys:
            raise ConfigError(f"backbone {config.model}: {key}: has no meaning for this model; take it out")
    with _LOADING:
        loaded: Backbone = importlib.import_module(family.module).load(config, device)
    return loaded
