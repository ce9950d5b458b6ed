"""Task kinds: how files become batches, and the head, loss and metric of each kind."""

from __future__ import annotations

from share_client.kinds.image_classification import ImageClassification
from share_client.kinds.keypoints import Keypoints
from share_client.kinds.kind import Kind, PreparedTask, Rows
from share_client.kinds.pose import Pose
from share_client.kinds.text_classification import TextClassification
from share_client.kinds.text_to_image import TextToImage
from share_core.errors import ConfigError

__all__ = ["Kind", "PreparedTask", "Rows", "find_kind"]

_KINDS: tuple[Kind, ...] = (ImageClassification(), TextClassification(), Keypoints(), Pose(), TextToImage())


def find_kind(name: str) -> Kind:
    """Return the kind of that name.

    Raises:
        ConfigError: there is none.
    """
    for kind in _KINDS:
        if kind.name == name:
            return kind
    raise ConfigError(f"kind: expected one of {', '.join(kind.name for kind in _KINDS)}, got {name!r}")
