"""Which kinds of tasks a backbone is for, and the refusal of one that it is not for."""

from __future__ import annotations

from share_client.backbones import Backbone, DecoderBackbone, ImageBackbone, TextBackbone
from share_client.backbones.diffusion import DiffusionBackbone
from share_core.errors import ConfigError

_KINDS = (
    (ImageBackbone, ("image-classification", "keypoints", "pose")),
    (TextBackbone, ("text-classification", "text-multi-label", "text-regression", "token-classification")),
    (DecoderBackbone, ("causal-lm", "instruction")),
    (DiffusionBackbone, ("text-to-image",)),
)


def kinds_for(backbone: Backbone) -> tuple[str, ...]:
    """Return the names of the kinds that can be learned on a backbone; none for an imported one of another class."""
    return tuple(name for made, names in _KINDS if isinstance(backbone, made) for name in names)


def misfit(task: str, kind: str, backbone: Backbone, does: str, such_as: str) -> ConfigError:
    """Return the error for a task whose kind cannot be learned on the backbone.

    Args:
        task: its name.
        kind: its kind.
        backbone: what the tasks file asks for.
        does: what a backbone for this kind does, as in "takes texts".
        such_as: what to set ``backbone`` to.
    """
    kinds = kinds_for(backbone)
    instead = f"; kinds for {backbone.name} are {', '.join(kinds)}" if kinds else ""
    return ConfigError(
        f"task {task!r}: kind: {kind} expects a backbone that {does}, got {backbone.name}: set backbone in tasks.toml "
        f"to {such_as}{instead}"
    )
