"""Which modules of a model are adapted: PEFT's rules for ``target_modules``, and its choice for known models."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from share_client.backbones.places import place_of
from share_core.errors import ConfigError

SITE_ENDINGS = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v")
"""Query and value maps of the encoders that PEFT's mapping leaves out, such as those of images."""
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear map."""


def choose_sites(module: nn.Module, targets: Sequence[str] | str, where: str) -> tuple[str, ...]:
    """Return the paths of the modules that PEFT would adapt for these ``target_modules``, in the model's order.

    A list names whole paths or their last parts; a string is a regular expression for the whole path, or
    ``all-linear``.

    Raises:
        ConfigError: no module is meant, or one whose change cannot be put beside it.
    """
    paths = [path for path, part in module.named_modules() if path and _meant(path, part, targets)]
    if not paths:
        some = [path for path, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)][:3]
        raise ConfigError(
            f"{where}: sites: expected modules matching {_shown(targets)}, found none; modules here are called "
            f"{', '.join(some) or 'otherwise, and none is a linear map or a convolution'}"
        )
    for path in paths:
        place_of(path, module.get_submodule(path))
    return tuple(paths)


def known_targets(model_type: str) -> tuple[str, ...] | str | None:
    """Return PEFT's ``target_modules`` for a type of Hugging Face model, None where PEFT has none.

    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    except ImportError as error:
        raise ConfigError("the choice of sites needs peft: pip install 'fedshare[text]'") from error
    found = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    return found if found is None or isinstance(found, str) else tuple(found)


def _meant(path: str, module: nn.Module, targets: Sequence[str] | str) -> bool:
    if targets == ALL_LINEAR:
        return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _shown(targets: Sequence[str] | str) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(targets)
