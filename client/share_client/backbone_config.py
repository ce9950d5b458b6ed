"""Which backbone a client trains on: ``backbone`` in ``tasks.toml``, a name or a table.

::

    backbone = "digits-vit"        # or "minilm", or the path of a model directory

    [backbone]
    model = "resnet20"             # or a name or path as above, "timm:NAME", "package.module:factory"
    weights = "resnet20.th"        # file with the weights, where the model is only an architecture
    sites = ["conv1", "conv2"]     # or one regular expression: PEFT's rules for target_modules
    quantised = "4bit"             # or "8bit"; Hugging Face models only, needs bitsandbytes
    image = [3, 32, 32]            # channels, height, width, where the model does not say
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from share_client import values
from share_core.errors import ConfigError

PACKAGED = ("digits-vit", "minilm")
"""Backbones that are named without a path."""
RESNETS = (
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
)  # fmt: skip
"""Architectures of :mod:`share_client.backbones.resnet`: the first five for CIFAR, the others as in torchvision."""
EXPECTED = (
    f"{', '.join(PACKAGED)}, the path of a model directory (Hugging Face or diffusers), "
    "resnet20 and the like with weights = FILE, timm:NAME, or package.module:factory"
)
"""What ``model`` may be, for messages."""
_IMPORTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class BackboneConfig:
    """What to load and what to adapt in it."""

    model: str
    """A packaged name, an architecture, ``timm:NAME``, ``package.module:factory``, or a model directory's path."""
    weights: Path | None = None
    """File with the weights: ``.safetensors``, or a state dict of torch, which is read without running code."""
    sites: tuple[str, ...] | str | None = None
    """PEFT's ``target_modules``: ends of module paths, or one regular expression. None: chosen by the kind of model."""
    quantised: str | None = None
    """``4bit`` or ``8bit``."""
    image: tuple[int, int, int] | None = None
    """(channels, height, width) of what the model takes."""


def read_backbone(value: object, folder: Path, where: str) -> BackboneConfig:
    """Read the value of ``backbone``; relative paths are meant from ``folder``.

    Raises:
        ConfigError: an unknown key, a value of the wrong kind, or a file or directory that does not exist.
    """
    table: Mapping[str, object] = {"model": value} if isinstance(value, str) else values.table(value, where)
    if "model" not in table:
        raise ConfigError(f"{where}: key 'model' is missing: expected {EXPECTED}")
    read: dict[str, Any] = values.read_keys(table, _READERS, where)
    model = str(read["model"])
    if "weights" in read:
        read["weights"] = (folder / str(read["weights"])).resolve()
        if not read["weights"].is_file():
            raise ConfigError(f"{where}: weights: expected a file, got {read['weights']}, which does not exist")
    if not _named(model):
        directory = folder / model
        if not directory.is_dir():
            raise ConfigError(f"{where}: expected {EXPECTED}, got {model!r}")
        read["model"] = str(directory.resolve())
    return BackboneConfig(**read)


def is_import_path(model: str) -> bool:
    """Return whether a model is named as ``package.module:factory``."""
    return not model.startswith("timm:") and _IMPORTED.fullmatch(model) is not None


def _named(model: str) -> bool:
    return model in (*PACKAGED, *RESNETS) or model.startswith("timm:") or is_import_path(model)


def _sites(value: object, where: str) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{where}: expected a regular expression, got {value!r}: {error}") from error
        return value
    if isinstance(value, list) and value and all(isinstance(one, str) and one for one in value):
        return tuple(value)
    raise ConfigError(
        f"{where}: expected a list of ends of module paths or one regular expression, got {values.show(value)}"
    )


def _image(value: object, where: str) -> tuple[int, int, int]:
    if isinstance(value, list) and len(value) == 3 and all(type(n) is int and 0 < n <= 65_536 for n in value):
        return value[0], value[1], value[2]
    raise ConfigError(f"{where}: expected [channels, height, width], got {values.show(value)}")


_READERS: Mapping[str, values.Reader] = {
    "model": values.text,
    "weights": values.text,
    "sites": _sites,
    "quantised": lambda value, where: values.one_of(value, ("4bit", "8bit"), where),
    "image": _image,
}
