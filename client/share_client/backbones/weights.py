"""Weights of a module from a file, read without running any code in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from share_core.errors import ConfigError


def load_weights(module: nn.Module, path: Path, without: Iterable[str] = ()) -> None:
    """Fill a module from ``.safetensors`` or a state dict saved by torch.

    A state dict under the key ``state_dict`` is taken from there, and ``module.``, which DataParallel puts before every
    name, is left out. Counters of batches (``num_batches_tracked``) may be missing: evaluation does not use them.

    Args:
        module: changed in place.
        path: the file; pickled objects other than tensors and plain values are refused.
        without: beginnings of names that are passed over, such as the classifier's.

    Raises:
        ConfigError: unreadable file, or names or shapes that are not those of the module; names the first of them.
    """
    found = {name.removeprefix("module."): value for name, value in _read(path).items()}
    found = {name: value for name, value in found.items() if not name.startswith(tuple(without))}
    expected = module.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - set(found) - counters)
    surplus = sorted(set(found) - set(expected))
    if missing or surplus:
        raise ConfigError(
            f"{path}: weights: expected the {len(expected)} tensors of {type(module).__name__}; missing "
            f"{', '.join(missing[:3]) or 'none'}, "
            f"unknown {', '.join(surplus[:3]) or 'none'}: it is of another architecture"
        )
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise ConfigError(
                f"{path}: weights: {name}: expected shape {tuple(expected[name].shape)}, got {tuple(value.shape)}: it "
                "is another size of the architecture"
            )
    module.load_state_dict(found, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name."""
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch's restricted reader raises is pickle's, which is not imported anywhere here
        raise ConfigError(
            f"{path}: weights: cannot read them as .safetensors or as a state dict of torch with weights_only=True: "
            f"{str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ConfigError(f"{path}: weights: expected a state dict of tensors, got {type(loaded).__name__}")
    return loaded
