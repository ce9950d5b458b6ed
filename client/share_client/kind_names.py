"""The task kinds by name: reading a tasks file needs the names alone, and the code of a kind is imported when used."""

from __future__ import annotations

import re
from collections.abc import Mapping

KINDS: Mapping[str, str] = {
    "image-classification": "share_client.kinds.image_classification:ImageClassification",
    "text-classification": "share_client.kinds.text_classification:TextClassification",
    "text-multi-label": "share_client.kinds.text_multi_label:TextMultiLabel",
    "text-regression": "share_client.kinds.text_regression:TextRegression",
    "token-classification": "share_client.kinds.token_classification:TokenClassification",
    "causal-lm": "share_client.kinds.causal_lm:CausalLanguageModelling",
    "instruction": "share_client.kinds.instruction:Instruction",
    "keypoints": "share_client.kinds.keypoints:Keypoints",
    "pose": "share_client.kinds.pose:Pose",
    "text-to-image": "share_client.kinds.text_to_image:TextToImage",
}
"""Where the class of each kind is, which takes no arguments."""
_IMPORTED = re.compile(r"(.*/)?[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_import_path(kind: str) -> bool:
    """Return whether a kind is one of the client's own, named as ``module:object``, perhaps with a folder before it."""
    return _IMPORTED.fullmatch(kind) is not None
